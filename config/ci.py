# A minute on two cores, for continuous integration: every stage runs, and the numbers mean nothing.
scale = "ci"
n_layer = 2
n_head = 1
n_embd = 64
ffn_dim = 128
block_size = 128
vocab_size = 4096
data_dir = "data/poetry"
max_tokens = 20_480
batch_tokens = 1024
eval_tokens = 2048
probe_tokens = 1024
log_interval = 10
sv_interval = 10
compile = False  # compiling would take longer than the runs
