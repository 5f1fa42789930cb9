//! The number that a host gives to one of its hops.

use serde::{Deserialize, Serialize};

/// The number of a hop on this host, 1 to 255.
///
/// It is local: the two ends of a tunnel number it independently. It has to fit into eight bits of
/// a conntrack mark, where zero means "no hop: route as usual".
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u8", into = "u8")]
pub struct HopId(u8);

/// Zero is not the number of a hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("0 is not the number of a hop: it stands for ordinary routing")]
pub struct HopIdError;

impl HopId {
    /// The largest number a hop can have.
    pub const MAX: HopId = HopId(u8::MAX);

    /// The number as it stands in a mark.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Every number a hop can have, smallest first.
    pub fn all() -> impl Iterator<Item = HopId> {
        (1..=u8::MAX).map(HopId)
    }

    /// The first byte of a packet mark, which carries the hop that a packet is to take.
    pub const PACKET_MARK_MASK: u32 = 0xff00_0000;

    /// The packet mark that sends a packet into this hop, under [`HopId::PACKET_MARK_MASK`].
    pub const fn packet_mark(self) -> u32 {
        (self.0 as u32) << 24
    }

    /// The routing table of this hop: `0x6c6d00` ("lm" in ASCII, then the hop), which is 7105792
    /// plus the hop and far from the tables that people number by hand.
    pub const fn table(self) -> u32 {
        0x006c_6d00 + self.0 as u32
    }

    /// The name of the hop's network interface on this host.
    pub fn interface(self) -> String {
        format!("livemig{}", self.0)
    }
}

impl TryFrom<u8> for HopId {
    type Error = HopIdError;

    fn try_from(number: u8) -> Result<Self, Self::Error> {
        if number == 0 {
            Err(HopIdError)
        } else {
            Ok(HopId(number))
        }
    }
}

impl From<HopId> for u8 {
    fn from(hop: HopId) -> u8 {
        hop.0
    }
}

impl std::fmt::Display for HopId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.0)
    }
}
