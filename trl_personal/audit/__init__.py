"""An audit of preference data before training: `audit_preferences`."""

from .report import Audit, audit_preferences


__all__ = ["Audit", "audit_preferences"]
