//! What a stream was, in short: its length and a checksum of its content.

use std::fmt;
use std::num::ParseIntError;

use serde::{Deserialize, Serialize};
use twox_hash::xxhash3_128;

/// How long a stream was, and what was in it.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "ChecksumText", try_from = "ChecksumText")]
pub struct Checksum {
    /// Bytes of content, before compression.
    pub bytes: u64,
    /// Their XXH3, of 128 bits and without a seed.
    pub xxh3: u128,
}

impl fmt::Display for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes with checksum {:032x}", self.bytes, self.xxh3)
    }
}

impl fmt::Debug for Checksum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Checksum({self})")
    }
}

/// The form of a checksum in JSON.
#[derive(Serialize, Deserialize)]
struct ChecksumText {
    bytes: u64,
    xxh3: String,
}

impl From<Checksum> for ChecksumText {
    fn from(checksum: Checksum) -> Self {
        ChecksumText {
            bytes: checksum.bytes,
            xxh3: format!("{:032x}", checksum.xxh3),
        }
    }
}

impl TryFrom<ChecksumText> for Checksum {
    type Error = ParseIntError;

    fn try_from(text: ChecksumText) -> Result<Self, Self::Error> {
        Ok(Checksum {
            bytes: text.bytes,
            xxh3: u128::from_str_radix(&text.xxh3, 16)?,
        })
    }
}

/// Sums up and counts content that goes by.
pub(super) struct Meter {
    hasher: xxhash3_128::Hasher,
    bytes: u64,
}

impl Meter {
    pub fn new() -> Meter {
        Meter {
            hasher: xxhash3_128::Hasher::new(),
            bytes: 0,
        }
    }

    pub fn update(&mut self, piece: &[u8]) {
        self.hasher.write(piece);
        self.bytes += piece.len() as u64;
    }

    /// How much it was so far.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    pub fn checksum(&self) -> Checksum {
        Checksum {
            bytes: self.bytes,
            xxh3: self.hasher.finish_128(),
        }
    }
}
