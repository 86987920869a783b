"""Planning: turns what calibration recorded into a Plan, stage by stage, and applies a Plan to a model."""
