//! The mark of a connection: which hop its packets take, in each direction.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::tunnel::HopId;

/// One of the two directions of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// That of the first packet.
    Original,
    /// That of the answers.
    Reply,
}

impl Direction {
    /// The other one.
    pub const fn opposite(self) -> Direction {
        match self {
            Direction::Original => Direction::Reply,
            Direction::Reply => Direction::Original,
        }
    }
}

/// A conntrack mark.
///
/// Its upper half is livemig's: bits 24 to 31 are the hop for packets in the original direction,
/// bits 16 to 23 that for the reply direction, zero being ordinary routing. The lower half is
/// others' (Podman uses 0x2000 of packet marks) and is left alone.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Mark(u32);

impl Mark {
    /// No hop in either direction.
    pub const NONE: Mark = Mark(0);
    /// The bits that are livemig's.
    pub const MASK: Mark = Mark(0xffff_0000);

    /// A mark as the kernel has it.
    pub const fn from_bits(bits: u32) -> Mark {
        Mark(bits)
    }

    /// The mark as the kernel has it.
    pub const fn bits(self) -> u32 {
        self.0
    }

    /// The mark that sends one direction into a hop.
    pub const fn to(direction: Direction, hop: HopId) -> Mark {
        Mark((hop.get() as u32) << Mark::shift(direction))
    }

    /// The bits of one direction: what to change when only that direction is to be steered.
    pub const fn mask(direction: Direction) -> Mark {
        Mark(0xff << Mark::shift(direction))
    }

    /// The hop that one direction takes; none is ordinary routing.
    pub fn hop(self, direction: Direction) -> Option<HopId> {
        HopId::try_from((self.0 >> Mark::shift(direction)) as u8).ok()
    }

    /// The same with the bits of `mask` replaced by those of `other`.
    #[must_use]
    pub const fn with(self, other: Mark, mask: Mark) -> Mark {
        Mark((self.0 & !mask.0) | (other.0 & mask.0))
    }

    /// Whether some direction takes a hop.
    pub fn is_steered(self) -> bool {
        self.0 & Mark::MASK.0 != 0
    }

    /// Whether some direction takes this hop.
    pub fn uses(self, hop: HopId) -> bool {
        self.hop(Direction::Original) == Some(hop) || self.hop(Direction::Reply) == Some(hop)
    }

    const fn shift(direction: Direction) -> u32 {
        match direction {
            Direction::Original => 24,
            Direction::Reply => 16,
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#010x}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_and_the_lower_half_do_not_disturb_each_other() {
        let three = HopId::try_from(3).unwrap();
        let last = HopId::MAX;
        let mark = Mark::from_bits(0x2000)
            .with(
                Mark::to(Direction::Original, three),
                Mark::mask(Direction::Original),
            )
            .with(
                Mark::to(Direction::Reply, last),
                Mark::mask(Direction::Reply),
            );
        assert_eq!(mark.bits(), 0x03ff_2000);
        assert_eq!(mark.hop(Direction::Original), Some(three));
        assert_eq!(mark.hop(Direction::Reply), Some(last));
        assert_eq!(mark.with(Mark::NONE, Mark::MASK).bits(), 0x2000);
        assert!(mark.uses(three) && !mark.uses(HopId::try_from(4).unwrap()));
    }
}
