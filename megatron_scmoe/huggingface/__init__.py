"""To Hugging Face and back.

tensor_names.py       every tensor by both names, in one table
layouts.py            how the parts of one lie in the other
config.py             what a model is, as Megatron's options and as a config.json
torch_dist.py         a Megatron checkpoint, tensor by tensor
safetensors_files.py  a Hugging Face directory, tensor by tensor
tokenizer.py          what lies beside weights: tokenizer, chat templates, generation config
progress.py           how far a conversion is
export.py             from the one to the other
load.py dialects.py longcat.py  from the other to the one, and what may come in
upcycle.py            a dense model as the start of one
configuration_scmoe.py modeling_scmoe.py  the model for transformers, copied beside the weights
verify.py logits.py   whether both are the same, by their tensors and their logits
inspect.py            what one of them is
"""
