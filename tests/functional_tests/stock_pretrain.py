"""Stock Megatron on this machine: the host's parser, model and loop, and none of our options.

Only the data side (batches, loss, datasets) is the entry script's, so that what is compared is the
model and its training.
"""

from megatron_scmoe import host, start

start.replace_host_symbols()

import torch
from megatron.core.enums import ModelType
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_args, validate_args
from megatron.training.global_vars import set_global_variables
from megatron.training.training import pretrain

from pretrain_gpt_scmoe import forward_step, train_valid_test_datasets_provider


def main() -> None:
    args = parse_args()
    host.apply_cpu_defaults(args)
    validate_args(args)
    set_global_variables(args)
    container = pretrain_cfg_container_from_args(args, gpt_config_from_args(args))
    pretrain(
        container, train_valid_test_datasets_provider, ModelType.encoder_or_decoder, forward_step
    )
    torch.distributed.destroy_process_group()
