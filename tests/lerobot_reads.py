"""Run by a Python that holds LeRobot: what it makes of an exported folder, as JSON lines of comparisons. Not a test by itself.

argv: the folder, and an .npz of what is expected. LeRobot builds one size only, so the few names that hold it are set here.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.pi0_fast import modeling_pi0_fast as pi0
from safetensors.numpy import load_file

folder, given = Path(sys.argv[1]), np.load(sys.argv[2])
size = json.loads(str(given["size"]))
built = pi0.PaliGemmaForConditionalGenerationWithPiGemma


def small(config):
    """Their model of the size that was exported."""
    for part in ("text_config", "vision_config"):
        for key, value in size[part].items():
            if key != "model_type":
                setattr(getattr(config, part), key, value)
    config.text_config._attn_implementation = config.vision_config._attn_implementation = "eager"
    return built(config=config)


pi0.PaliGemmaForConditionalGenerationWithPiGemma = small
policy = pi0.PI0FastPolicy.from_pretrained(folder).eval()
told = {}


def close(name, a, b, tolerance):
    a, b = (np.asarray(x.detach().float() if isinstance(x, torch.Tensor) else x, np.float64) for x in (a, b))
    told[name] = {"shape": a.shape == b.shape, "off": float(np.abs(a - b).max()) if a.shape == b.shape else -1, "tolerance": tolerance}


file, state = load_file(folder / "model.safetensors"), policy.state_dict()
told["names"] = {"missing": sorted(state.keys() - file.keys()), "superfluous": sorted(file.keys() - state.keys()), "count": len(file)}
for name in state.keys() & file.keys():
    if state[name].shape != file[name].shape or not np.array_equal(state[name].float().numpy(), file[name].astype(np.float32)):
        told.setdefault("differ", []).append(name)

before, after = make_pre_post_processors(policy.config, str(folder))
cameras = list(policy.config.image_features)
observation = {c: torch.tensor(x.transpose(2, 0, 1) / 255, dtype=torch.float32) for c, x in zip(cameras, given["images"])}
observation |= {"observation.state": torch.tensor(given["state"]), "task": str(given["task"])}
batch = before(observation)
tokens, masks = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
n = int(masks.sum())
close("prompt", tokens[0, :n], given["prompt"], 0)

with torch.no_grad():
    images, seen = policy._preprocess_images(batch)
    fast = torch.tensor(given["postfix"], dtype=torch.long)[None]
    for name, language, mask in (("logits", tokens[:, :n], masks[:, :n]), ("logits behind pads", tokens, masks)):
        made = policy.model.embed_prefix_fast(images, seen, language, mask, fast, torch.ones_like(fast, dtype=torch.bool))
        embedded, pads, attention = made[:3]
        out = policy.model.paligemma_with_expert.forward(
            attention_mask=pi0.prepare_attention_masks_4d(attention, dtype=embedded.dtype),
            position_ids=torch.cumsum(pads, dim=1) - 1,
            inputs_embeds=[embedded, None],
            use_cache=False,
        )[0][0]
        scores = policy.model.paligemma_with_expert.paligemma.lm_head(out[0, -fast.shape[1] - 1 :])
        if name == "logits":  # from the last token of the prompt on
            close(name, scores, given["logits"], 1e-4)
        else:
            close(name, scores[1:], given["logits"][1:], 1e-4)
    for name in ("sample_actions_fast", "sample_actions_fast_kv_cache"):
        ids = getattr(policy.model, name)(images, seen, tokens, masks, max_decoding_steps=len(given["greedy"]))
        ended = np.flatnonzero(given["greedy"] == policy._paligemma_tokenizer.convert_tokens_to_ids("|"))
        count = ended[0] + 1 if len(ended) else len(given["greedy"])
        close(name, ids[0, :count], given["greedy"][:count], 0)

steps, dims = given["chunk"].shape
close("decoded", policy.detokenize_actions(torch.tensor(given["answer"]), steps, dims), given["chunk"], 1e-5)
close("robot units", after(torch.tensor(given["chunk"])[None])[0], given["actions"], 1e-5)
whole = before({**observation, "action": torch.tensor(given["actions"])[None]})
at = int(whole["action.token_mask"].sum()) if "action.token_mask" in whole else 0
told["encoded"] = [] if not at else whole["action.tokens"][0, :at].tolist()
told["keys"] = sorted(whole)
print("REPORT " + json.dumps(told))
