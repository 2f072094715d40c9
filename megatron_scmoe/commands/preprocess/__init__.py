"""From text to Megatron's indexed datasets: the parts behind tools/preprocess_data.py.

In the order in which a document meets them: `json_lines` (files to lines), `host_tokenizer`
(options to a tokenizer), `byte_level_bpe` (its fast equal), `encoding` (lines to token ids),
`worker_pool` (that, on every core, in order), `dataset_writer` (token ids to files that appear only
when whole), `interrupt` (told to stop).
"""


class DataError(ValueError):
    """The user's files or options are wrong; the message is one line and says what to do."""
