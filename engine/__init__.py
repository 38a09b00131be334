"""mapdistill's engine: layer-mapped distillation of Transformer encoders under DeepSpeed."""
