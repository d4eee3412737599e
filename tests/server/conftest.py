"""A real server on a free port: a tiny random model, a real tokenizer, uvicorn in a thread."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import uvicorn

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.packed_model import PackedModel, fits
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.model.transformer import Transformer, initialise
from shoal.server.access import Access
from shoal.server.app import ServerOptions, build_app
from shoal.server.generation import ServedModel
from shoal.server.worker import EngineWorker
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from shoal.text.tools import MARKS


@dataclass
class Running:
    """Where a server listens and what it serves."""

    url: str
    served: ServedModel


FIM_MARKS = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


def tiny_tokenizer(more_tokens: tuple[str, ...] = ()) -> Tokenizer:
    """A small tokenizer with further control tokens."""
    special = (*SPECIAL_TOKENS, *more_tokens)
    return Tokenizer.train(["how many fish are in the shoal? 12 fish."] * 4, 291 + len(special), special)


def tiny_model(tokenizer: Tokenizer, context: int) -> Transformer:
    """A random model for a tokenizer."""
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        max_position_embeddings=context,
        initializer_range=0.3,
    )
    model = Transformer(config)
    initialise(model, 0)
    return model


def tiny_served(context: int = 256, more_tokens: tuple[str, ...] = ()) -> ServedModel:
    """A random model of a real tokenizer's size.

    Args:
        more_tokens: control tokens that its tokenizer has besides the usual ones.
    """
    tokenizer = tiny_tokenizer(more_tokens)
    model = tiny_model(tokenizer, context)
    config = model.config
    if fits(config):
        packed = PackedModel(config, model.state_dict().__getitem__, "f32")
        engine: Engine | ServingEngine = ServingEngine(packed, ServingConfig(cache_bytes=max(1 << 22, context << 12)))
    else:
        engine = Engine(model.eval())
    return ServedModel(
        name="tiny",
        worker=EngineWorker(engine),
        tokenizer=tokenizer,
        template=ChatTemplate.default(tokenizer),
        max_context=context,
        description="Random weights, for tests.",
        suggestions=["how many fish?", "<b>bold?</b>"],
    )


def run_server(options: ServerOptions | None = None, served: ServedModel | None = None) -> Iterator[Running]:
    served = served or tiny_served()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(build_app(served, options), host="127.0.0.1", port=port, log_level="warning")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Running(f"http://127.0.0.1:{port}", served)
    server.should_exit = True
    thread.join(timeout=10)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    yield from run_server()


@pytest.fixture(scope="module")
def locked() -> Iterator[Running]:
    yield from run_server(ServerOptions(access=Access(["secret"])))


@pytest.fixture(scope="module")
def roomy() -> Iterator[Running]:
    """With room for tools in the prompt, and tokens for their calls and for filling in."""
    yield from run_server(served=tiny_served(4096, (*MARKS, *FIM_MARKS)))
