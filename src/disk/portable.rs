//! The portable disk (to come).
