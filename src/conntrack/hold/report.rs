//! What a hold did.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Where the packets go that were held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum To {
    /// The container runs at the destination: everything goes on, clients' packets by their marks
    /// through the hop, the container's own from the hop to its clients.
    Destination,
    /// The container runs where it was: clients' packets go on, and what has the container's own
    /// address as its source is dropped, for it comes from a copy that does not exist any more.
    Source,
}

/// What a hold did. Every packet that was held was either released or discarded.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldReport {
    /// How many packets were held.
    pub held: u64,
    /// How many of them went on.
    pub released: u64,
    /// How many of them were dropped because they came from the destination and the container
    /// stays at the source.
    pub discarded: u64,
    /// How many packets found no room and were dropped.
    pub dropped_by_bound: u64,
    /// The longest that one of them waited.
    pub longest_held: Duration,
    /// The most packets that waited at the same time.
    pub peak: u64,
    /// The most bytes of packets that waited at the same time, headers included.
    pub peak_bytes: u64,
    /// From the first packet that was let go to the moment from which on packets did not wait any
    /// more.
    pub release: Duration,
    /// Whether the rest was let go at once in the end, since letting it go at a pace took too long.
    pub gave_up_pace: bool,
}
