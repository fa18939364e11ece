# Muon on hidden matrices, AdamW on the rest, QK-Norm whose gains stay at one: does QK-Norm act by its gains?
arm = "muon_qk_frozen"
optimizer = "muon"
qk_norm = True
qk_gain = False
