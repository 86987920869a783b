"""Planning: from what calibration showed to a Plan, stage by stage, and the application of a Plan to a model."""
