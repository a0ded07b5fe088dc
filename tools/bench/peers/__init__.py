"""What wastenot is measured against: one file per peer, each building the same Mixtral-like decoder and MoE layer."""
