# Muon on hidden matrices, AdamW on the rest, with QK-Norm.
arm = "muon_qk"
optimizer = "muon"
qk_norm = True
