"""Simulators behind one adapter: the tabletop world always; MetaWorld, Push-T and robosuite with the extra `sim`. No jax, no TensorFlow."""
