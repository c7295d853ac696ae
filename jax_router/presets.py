"""Static options of published models: `route(logits, **presets.mixtral)`.

Each preset is a read-only mapping of keyword arguments of `jax_router.route`, `k` included, which
`route_with_stats` and `route_dense` take too. Overrides read `route(logits, **{**preset, "k": 4})`.

A preset holds what the router's code and configuration fix, not what the checkpoint holds: models
said to have a bias (`e_score_correction_bias`) need `bias=` with its values, in float32. The number
of experts E is that of the logits. Shared experts are not routed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from jax_router._options import Groups


def _preset(k: int, **options: Any) -> Mapping[str, Any]:
  return MappingProxyType({"k": k, **options})


mixtral = _preset(2)
"""Mixtral 8x7B and 8x22B, E = 8: a softmax over the chosen logits.

Source: "Mixtral of Experts" (arXiv 2401.04088) section 2.1; `num_experts_per_tok` of
mistralai/Mixtral-8x7B-v0.1 config.json.
"""

qwen3_moe = _preset(8)
"""Qwen3-30B-A3B and Qwen3-235B-A22B, E = 128: a softmax over all, renormalized.

Source: `num_experts_per_tok`, `norm_topk_prob` = true of Qwen/Qwen3-30B-A3B config.json;
Qwen3MoeSparseMoeBlock of transformers.
"""

deepseek_v2 = _preset(6, renormalize=False, scale=16.0, groups=Groups(8, 3, "max"))
"""DeepSeek-V2, E = 160: the best 3 of 8 groups by their largest score; softmax over all experts.

Source: arXiv 2405.04434 section 2.2; `topk_method` = group_limited_greedy, `norm_topk_prob` =
false, `routed_scaling_factor` of deepseek-ai/DeepSeek-V2 config.json.
"""

deepseek_v3 = _preset(8, score="sigmoid", scale=2.5, groups=Groups(8, 4, "top2"))
"""DeepSeek-V3, V3.1 and R1, E = 256: with a bias; the best 4 of 8 groups by their two best experts.

Source: arXiv 2412.19437 section 2.1.2; `n_group`, `topk_group`, `scoring_func`,
`routed_scaling_factor` of deepseek-ai/DeepSeek-V3 config.json.
"""

deepseek_v4_flash = _preset(6, score="sqrtsoftplus", scale=1.5)
"""DeepSeek-V4-Flash, E = 256: with a bias; sqrt(softplus), renormalized, no groups.

The first three layers take their experts from a table of token ids instead: `experts=` with the
table's rows, and no bias. Source: `scoring_func`, `num_experts_per_tok`, `routed_scaling_factor` of
deepseek-ai/DeepSeek-V4-Flash config.json, and inference/model.py there.
"""

deepseek_v4 = deepseek_v4_flash
"""`deepseek_v4_flash`. DeepSeek-V4-Pro has the same rule over E = 384; take `scale` from its
`routed_scaling_factor`.
"""

kimi_k2 = _preset(8, score="sigmoid", scale=2.827)
"""Kimi K2, E = 384: DeepSeek-V3's rule with a bias and one group.

Source: `n_group` = 1, `num_experts_per_tok`, `scoring_func`, `routed_scaling_factor` of
moonshotai/Kimi-K2-Instruct config.json.
"""

kimi_k3 = _preset(16, score="sigmoid")
"""Kimi K3, E = 896: with a bias; renormalized, not scaled, no groups.

Source: `num_experts`, `num_experts_per_token`, `moe_router_activation_func`, `num_expert_group` = 1
of moonshotai/Kimi-K3 config.json.
"""

glm_4_5 = _preset(8, score="sigmoid", scale=2.5)
"""GLM-4.5 and GLM-4.6, E = 160: DeepSeek-V3's rule with a bias and one group.

Source: `num_experts_per_tok`, `norm_topk_prob` = true, `n_group` = 1, `routed_scaling_factor` of
zai-org/GLM-4.5 config.json; Glm4MoeTopkRouter of transformers.
"""

glm_4_5_air = _preset(8, score="sigmoid")
"""GLM-4.5-Air, E = 128: as GLM-4.5, not scaled.

Source: `routed_scaling_factor` = 1.0 of zai-org/GLM-4.5-Air config.json.
"""

gpt_oss = _preset(4)
"""gpt-oss-120b (E = 128) and gpt-oss-20b (E = 32): a softmax over the chosen logits.

The router's linear layer has a bias of its own, which belongs to the logits. Source:
`num_experts_per_tok` of openai/gpt-oss-120b config.json; MLPBlock of gpt_oss/torch/model.py.
"""

llama_4 = _preset(1, score="sigmoid", renormalize=False)
"""Llama 4 Scout (E = 16) and Maverick (E = 128): the sigmoid of the one chosen logit.

The model scales the expert's input by it, not the output. Source: `num_experts_per_tok` of
meta-llama/Llama-4-Maverick-17B-128E config.json; Llama4TextMoe of transformers.
"""
