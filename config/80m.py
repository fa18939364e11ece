# The plan's scale: 79.1M parameters, main runs of 300M tokens. train.py's defaults, repeated to be read here.
scale = "80m"
n_layer = 22
n_head = 8
n_embd = 512
ffn_dim = 896
block_size = 2048
vocab_size = 50304
data_dir = "data/fineweb_edu"
max_tokens = 300_000_000  # 3.8 tokens a parameter
batch_tokens = 32_768
eval_tokens = 0  # the plan's 5M
probe_tokens = 8192
log_interval = 500
sv_interval = 5000
