"""What is done with the encoded batches of a run, and how far that is."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from megatron_scmoe import __version__
from megatron_scmoe.commands.preprocess import DataError
from megatron_scmoe.commands.preprocess.corpus import Bookmark, find_files
from megatron_scmoe.commands.preprocess.dataset_writer import OutputFolder
from megatron_scmoe.commands.preprocess.encoding import EncodedBatch, Encoder
from megatron_scmoe.commands.preprocess.host_tokenizer import fingerprint
from megatron_scmoe.commands.preprocess.output_names import blend_names, output_names
from megatron_scmoe.commands.preprocess.terminal import Progress, say

SKIPPED_SHOWN = 10


class PreprocessJob:
    """What is done with the encoded batches, and how far that is.

    Args:
        progress: of an earlier run's `progress`, to go on from there.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        encoder: Encoder,
        output: OutputFolder,
        bar: Progress,
        progress: dict[str, Any] | None,
    ) -> None:
        self._args, self._output, self._bar = args, output, bar
        self._vocab_size = encoder.tokenizer.vocab_size
        self.place = Bookmark(*progress["place"]) if progress else Bookmark()
        self._bad_lines = progress["bad_lines"] if progress else 0
        self._repaired = progress["repaired"] if progress else 0
        if progress:
            bar.go_on(progress["documents"], progress["text_bytes"])
        states = progress["datasets"] if progress else {}
        partitions = 1 if args.keep_sequential_samples else args.partitions
        self._names = output_names(args)
        self._writers = {
            dataset: output.create(name, encoder.dtype, partitions, states.get(name))
            for dataset, name in self._names.items()
        }
        # Of each file the input, where each has datasets of its own.
        self._inputs = [
            number if args.input_weights else 0
            for number, name in enumerate(args.input)
            for _ in find_files([name])
        ]

    def add(self, batch: EncodedBatch) -> None:
        """Write the documents of a batch, and count its bad lines.

        Raises:
            DataError: there is one, and --on-error is fail.
        """
        for bad in batch.bad_lines:
            if self._args.on_error == "fail":
                raise DataError(f"{bad} (--on-error skip leaves such lines out)")
            self._bad_lines += 1
            if self._bad_lines <= SKIPPED_SHOWN:
                say(f"skipped {bad}")
        for key in self._args.json_keys:
            self._writers[self._inputs[batch.end.file], key].add(
                batch.tokens[key], batch.lengths[key], batch.sequences[key]
            )
        self._repaired += batch.repaired
        self._bar.add(batch.documents, batch.text_bytes, batch.disk_bytes)
        self.place = batch.end

    def progress(self) -> dict[str, Any]:
        """Of JSON's types; what it counts is on disk when this returns."""
        return {
            "place": dataclasses.astuple(self.place),
            "bad_lines": self._bad_lines,
            "repaired": self._repaired,
            "documents": self._bar.documents,
            "text_bytes": self._bar.text_bytes,
            "datasets": {name: self._writers[key].state() for key, name in self._names.items()},
        }

    def finish(self) -> None:
        """Complete the datasets, not yet under their final names.

        Raises:
            DataError: there are no documents, or all of a dataset are empty.
        """
        args = self._args
        if self._bad_lines:
            say(f"skipped {self._bad_lines} lines in all")
        if self._repaired:
            say(f"replaced {self._repaired} unpaired surrogates by U+FFFD")
        if not self._bar.documents:
            raise DataError(f"no documents in --input {' '.join(args.input)}: nothing to write")
        for (number, key), writer in self._writers.items():
            if not writer.tokens:
                where = f" of --input {args.input[number]}" if args.input_weights else ""
                raise DataError(f"every {key!r}{where} is empty: nothing to write")
            writer.finish(self._description(key))
        for key, name in blend_names(args).items():
            folder = Path(args.output_prefix).absolute().parent
            lines = (
                f"{weight:g} {folder / self._names[number, key]}\n"
                for number, weight in enumerate(args.input_weights)
            )
            self._output.add_text(name, "".join(lines))

    def summary(self) -> str:
        """Counts of documents without ids, and of ids, by key."""
        tokens, empty = (dict.fromkeys(self._args.json_keys, 0) for _ in range(2))
        for (_, key), writer in self._writers.items():
            tokens[key] += writer.tokens
            empty[key] += writer.empty_documents
        without = ", ".join(f"{count} with empty {key}" for key, count in empty.items() if count)
        total = ", ".join(f"{count} tokens of {key}" for key, count in tokens.items())
        return f"{', ' + without if without else ''}: {total}"

    def _description(self, key: str) -> dict[str, object]:
        """What the manifest says beside the counts; the same for any number of workers."""
        args = self._args
        return {
            "format": 1,
            "megatron_scmoe": __version__,
            "key": key,
            "tokenizer_type": args.tokenizer_type,
            "tokenizer_model": args.tokenizer_model,
            "tokenizer_sha256": fingerprint(args),
            "vocab_size": self._vocab_size,
            "append_eod": args.append_eod,
            "split_sentences": args.split_sentences,
            "skipped_lines": self._bad_lines,
            "replaced_surrogates": self._repaired,
        }
