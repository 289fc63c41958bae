"""Early exit: scores, thresholds and exit rules, calibration, adaptive inference, and export."""
