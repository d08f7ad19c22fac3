"""A small seeded tabletop world with three different robots: the demo's data and its closed-loop test. numpy only."""
