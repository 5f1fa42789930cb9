//! tunnel

mod hop_id;

pub use hop_id::{HopId, HopIdError};
