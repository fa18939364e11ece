# Ten minutes on two cores, half an hour where they have no bfloat16: the study as a working whole, far too short.
scale = "mini"
n_layer = 6
n_head = 2
n_embd = 128
ffn_dim = 352
block_size = 256
vocab_size = 4096  # GPT-2's BPE cut after its first merges
data_dir = "data/poetry"
max_tokens = 786_432  # 384 steps
batch_tokens = 2048
eval_tokens = 32_768  # a val pass of a second
probe_tokens = 4096
log_interval = 64  # so that rows and token checkpoints coincide: a look costs as much as a dozen steps
sv_interval = 320
