"""From question-and-answer documents to a trained model: tokenizer, shards with the questions masked, one training stage."""

from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from shoal.model.transformer import Transformer
from shoal.recipes.problem_corpus import Document
from shoal.text.chat_template import ChatTemplate
from shoal.text.loader import Loader, evaluation_batches
from shoal.text.shards import Shards, ShardWriter
from shoal.text.tokenizer import ANSWER, END_ANSWER, END_THINK, THINK, Tokenizer
from shoal.training.evaluate import evaluate, token_byte_lengths
from shoal.training.loop import TrainingConfig, TrainingResult, train

DOCUMENTS_AT_ONCE = 4096


def train_tokenizer(documents: Iterable[Document], vocab_size: int) -> Tokenizer:
    """Merges of these documents. The format's own tags are single tokens already and must not be merged into others."""

    def plain(document: Document) -> str:
        text = f"{document.question or ''}\n{document.response}"
        for tag in (THINK, END_THINK, ANSWER, END_ANSWER):
            text = text.replace(tag, "\n")
        return text

    return Tokenizer.train(map(plain, documents), vocab_size)


def write_documents(
    directory: Path, documents: Iterable[Document], tokenizer: Tokenizer, template: ChatTemplate
) -> int:
    """Shard documents; questions carry no loss. Returns the number of tokens.

    They are taken some thousands at a time, so a generator's worth never lies in memory.
    """
    writer = ShardWriter(directory, vocab_size=tokenizer.vocab_size, tokenizer_digest=tokenizer.digest)
    before, after = template.frame(tokenizer)
    stream = iter(documents)
    while part := list(islice(stream, DOCUMENTS_AT_ONCE)):
        questions = tokenizer.encode_batch([document.question or "" for document in part])
        responses = tokenizer.encode_batch([document.response for document in part], allow_special=True)
        for document, question, response in zip(part, questions, responses):
            prompt = [*before, *question, *after]
            if document.question is None:
                prompt = [tokenizer.bos_token_id]
            elif document.history:
                prompt = template.encode(tokenizer, _messages(document))
            loss_mask = [False] * len(prompt) + [True] * (len(response) + 1)
            writer.add([*prompt, *response, tokenizer.eos_token_id], loss_mask)
    return writer.close().num_tokens


def train_on_documents(
    model: Transformer,
    config: TrainingConfig,
    shards: Path,
    tokenizer: Tokenizer,
    run_dir: Path,
    *,
    stage: str,
    batch_rows: int,
    row_tokens: int,
) -> TrainingResult:
    """One stage on `shards/train`, measured on `shards/held_out`: pretraining or fine-tuning, the data decides.

    Raises:
        CheckpointError, ShardError: another configuration's checkpoint, or shards of another tokenizer.
    """
    opened = {name: Shards.open(shards / name, expected_digest=tokenizer.digest) for name in ("train", "held_out")}
    bytes_of_token = token_byte_lengths(tokenizer)
    layout: dict[str, Any] = {"row_tokens": row_tokens, "mode": "pack", "pad_token": tokenizer.pad_token_id}
    return train(
        model,
        config,
        Loader(opened["train"], batch_rows=batch_rows, seed=config.seed, **layout),
        run_dir,
        stage=stage,
        evaluate=lambda: evaluate(
            model, evaluation_batches(opened["held_out"], batch_rows=64, **layout), bytes_of_token
        ),
    )


def _messages(document: Document) -> list[dict[str, str]]:
    messages = []
    for question, answer in document.history:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return [*messages, {"role": "user", "content": document.question or ""}]
