"""The engine's decisions are found again, replayed in the trainer, and change exactly what they should."""

import pytest
import torch

from shoal.engine.engine import Engine
from shoal.engine.runner import PackedRunner, TransformerRunner
from shoal.engine.sampling import cut_tail
from shoal.errors import ConfigError
from shoal.model.latent_cache import LatentCache
from shoal.model.router import Routing
from shoal.model.transformer import Transformer, initialise
from shoal.rl.engine_replay import _packed, replay_engine
from shoal.rl.packed_rollouts import pack_rollouts
from shoal.rl.rollout import sample_rollouts
from shoal.rl.update import UpdateOptions, policy_log_probabilities
from tests.rl.test_update import PROBLEMS, PROMPTER, TOKENIZER, _advantages, _model, _update

CUT = {"temperature": 0.9, "top_p": 0.7, "top_k": 12}


def _cut_rollouts(model):
    return sample_rollouts(Engine(model), PROMPTER, PROBLEMS[:3], group_size=4, max_tokens=9, seed=1, **CUT)


def _replay(model, rollouts, routing=True, mask=True):
    return replay_engine(model, rollouts, keep_routing=routing, keep_sampling_mask=mask, **CUT)


def _wide_model(**changes):
    """A model that the packed pass fits: latents and hidden widths in whole lanes."""
    wide = {
        "hidden_size": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "moe_intermediate_size": 16,
        "intermediate_size": 32,
    }
    return _model(**wide, **changes)


def test_the_choices_of_the_decoding_engine_are_found_again_bit_for_bit():
    model = _wide_model()
    if _packed(model) is None:
        pytest.skip("the packed CPU pass is not built on this machine")
    rollouts = _cut_rollouts(model)
    replay = _replay(model, rollouts)
    packed = PackedRunner(model)._fresh()
    for answer in (0, 5):
        prompt, ids = rollouts.prompt_ids[answer], rollouts.completions[answer].token_ids
        cache = LatentCache(model.config, 1, 64, dtype=torch.float32)
        zero = torch.zeros(1, dtype=torch.int32)
        for place, token in enumerate([*prompt, *ids]):  # one token at a time, as decoding does
            chosen = torch.zeros(model.config.num_hidden_layers, 1, model.config.num_experts_per_tok, dtype=torch.int32)
            position = torch.tensor([place], dtype=torch.int32)
            logit_1V = packed.run(
                torch.tensor([token]), position, zero, cache.entry_LBTW, output_row=zero, chosen_LMK=chosen
            )
            assert torch.equal(replay.experts_of(answer)[:, place].int(), chosen[replay.layers, 0])
            if len(prompt) - 1 <= place < len(prompt) + len(ids) - 1:
                log_probability = (logit_1V / CUT["temperature"]).log_softmax(dim=-1)
                cut = cut_tail(log_probability, torch.tensor([CUT["top_k"]]), torch.tensor([CUT["top_p"]]))
                kept = replay.kept_of(answer, model.config.vocab_size)[place - len(prompt) + 1]
                assert torch.equal(kept, cut[0].isfinite())


def test_with_the_sampling_mask_the_trainer_agrees_with_the_cut_sampler():
    model = _wide_model()
    rollouts = _cut_rollouts(model)
    options = UpdateOptions(temperature=CUT["temperature"], row_tokens=64)
    drawn = torch.tensor([value for completion in rollouts.completions for value in completion.logprobs])
    without = torch.cat(policy_log_probabilities(model, rollouts, options))
    within = torch.cat(policy_log_probabilities(model, rollouts, options, replay=_replay(model, rollouts)))
    assert float((within - drawn).abs().max()) < 1e-4
    assert float((without - drawn).abs().max()) > 0.1


def test_on_policy_replayed_routing_changes_nothing():
    """With equal weights the trainer would have chosen the same: replay must then be the identity, gradients included."""
    model = _wide_model()
    rollouts = _cut_rollouts(model)
    replay = _replay(model, rollouts, mask=False)
    _, plain = _update(model, rollouts, _advantages(rollouts), temperature=0.9)
    model.zero_grad()
    _, replayed = _update(model, rollouts, _advantages(rollouts), temperature=0.9, replay=replay)
    for name, gradient in plain.items():
        assert gradient is None or torch.equal(gradient, replayed[name]), name


def test_replayed_experts_are_used_and_their_gates_are_computed_anew():
    model = _wide_model()
    rollouts = _cut_rollouts(model)
    replay = _replay(model, rollouts, mask=False)
    replay.expert_LMK = (replay.expert_LMK + 1) % model.config.n_routed_experts
    packed = pack_rollouts(rollouts, range(12), [False] * 12, 64, replay=replay)
    routing = packed.routing()
    hidden = model(packed.token_BS, position_BS=packed.position_BS, document_BS=packed.document_BS, routing=routing)
    real = packed.document_BS.reshape(-1) >= 0
    for layer, expert_MK in zip(routing.layers, routing.expert_LMK):
        assert torch.equal(expert_MK[real], packed.replay[layer][real])
    free = Routing()
    other = model(packed.token_BS, position_BS=packed.position_BS, document_BS=packed.document_BS, routing=free)
    assert not torch.allclose(hidden[packed.document_BS >= 0], other[packed.document_BS >= 0], atol=1e-4)
    hidden[packed.document_BS >= 0].square().sum().backward()
    gates = [module.weight.grad for name, module in model.named_modules() if name.endswith("mlp.gate")]
    assert gates and all(grad is not None and float(grad.abs().max()) > 0 for grad in gates if grad is not None)


def test_a_module_without_the_packed_pass_replays_its_own_choices():
    model = _model(kv_lora_rank=12)  # not whole lanes
    assert _packed(model) is None
    rollouts = sample_rollouts(
        Engine(model, runner=TransformerRunner(model)),
        PROMPTER,
        PROBLEMS[:3],
        group_size=4,
        max_tokens=9,
        seed=1,
        **CUT,
    )
    options = UpdateOptions(temperature=CUT["temperature"], row_tokens=64)
    drawn = torch.tensor([value for completion in rollouts.completions for value in completion.logprobs])
    within = torch.cat(policy_log_probabilities(model, rollouts, options, replay=_replay(model, rollouts)))
    assert float((within - drawn).abs().max()) < 1e-3


def test_a_dense_model_has_no_routing_to_keep():
    config = _model().config.replace(vocab_size=TOKENIZER.vocab_size, n_routed_experts=None, first_k_dense_replace=0)
    model = Transformer(config)
    initialise(model, 0)
    with pytest.raises(ConfigError, match="no routed experts"):
        _replay(model, sample_rollouts(Engine(model), PROMPTER, PROBLEMS[:1], group_size=2, max_tokens=2), mask=False)
