# A night on two cores, or minutes on a GPU: 4.4M parameters and the plan's ratios of tokens to parameters.
scale = "4m"
n_layer = 8
n_head = 3  # head dim 64, as everywhere: PR is out of 64
n_embd = 192
ffn_dim = 512
block_size = 512
vocab_size = 4096  # GPT-2's BPE cut after its first merges
data_dir = "data/poetry"
max_tokens = 16_000_000
batch_tokens = 8192
eval_tokens = 131_072
probe_tokens = 8192
log_interval = 100
sv_interval = 500
