"""From text to Megatron's indexed datasets: the parts behind tools/preprocess_data.py.

In the order in which a document meets them: `json_lines` (files to lines), `host_tokenizer`
(options to a tokenizer), `kept_tokenizer` (the same without Megatron), `engines` (its fast equal:
`byte_level_bpe`, `sentencepiece_bpe`; `proof` that it is equal), `encoding` (lines to token ids),
`worker_pool` (that, on every core, in order), `dataset_writer` (token ids to files that appear only
when whole, made in a `work_folder`), `interrupt` (told to stop).
"""


class DataError(ValueError):
    """The user's files or options are wrong; the message is one line and says what to do."""
