//! Whether content is compressed on its way, which is decided by measuring.
//!
//! How fast the connection takes what it is given shows while it is given. Where that is slower than the
//! slowest that a compressor is on any processor, the next piece is compressed for once; and as long as that and
//! its shorter way take less time than its whole way would, so are those after it. Content that does not get
//! shorter is tried again now and then, since what comes behind it may.

use std::time::{Duration, Instant};

use zstd::bulk::Compressor;

/// So much has to have gone before it is clear how fast the connection is: what the system has room for goes
/// at once. 4 MiB, the most that Linux keeps for a connection by itself (`net.ipv4.tcp_wmem`).
const CLEAR: f64 = (4 << 20) as f64;
/// A connection that is faster than this is never given anything compressed, in bytes per second: zstd at its
/// fastest level makes some 500 MB/s of one processor.
const FAST: f64 = 500e6;
/// Smaller pieces are left as they are, in bytes.
const SMALL: usize = 1 << 10;
/// Every so manieth piece is tried again.
const AGAIN: u32 = 64;
/// zstd's fastest level that is not a negative one.
const LEVEL: i32 = 1;

/// When pieces are compressed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Compression {
    /// When that is quicker.
    #[default]
    Measured,
    /// Whenever they get shorter by it.
    #[cfg(test)]
    Always,
}

/// Decides piece by piece, and compresses.
pub(super) struct Packer {
    when: Compression,
    connection: Connection,
    /// What compressing came to when it was tried last.
    tried: Option<Tried>,
    since: u32,
    compressor: Option<Compressor<'static>>,
}

/// How fast a connection takes what it is given. Old measurements fade.
#[derive(Debug, Default)]
struct Connection {
    given: f64,
    bytes: f64,
    seconds: f64,
}

#[derive(Debug, Clone, Copy)]
struct Tried {
    /// Seconds for each byte.
    cost: f64,
    /// How long a piece was afterwards, as a part of what it had been.
    left: f64,
}

impl Packer {
    pub fn new(when: Compression) -> Packer {
        Packer {
            when,
            connection: Connection::default(),
            tried: None,
            since: 0,
            compressor: None,
        }
    }

    /// The connection has taken so many bytes in this time.
    pub fn taken(&mut self, bytes: usize, took: Duration) {
        let connection = &mut self.connection;
        let bytes = bytes as f64;
        connection.given += bytes;
        // What was given 4 MiB ago counts for a third.
        let fade = (-bytes / CLEAR).exp();
        connection.bytes = connection.bytes * fade + bytes;
        connection.seconds = connection.seconds * fade + took.as_secs_f64();
    }

    /// A piece compressed, if that is better.
    pub fn pack(&mut self, piece: &[u8]) -> Option<Vec<u8>> {
        if piece.len() < SMALL || !self.pays() {
            return None;
        }
        let began = Instant::now();
        if self.compressor.is_none() {
            // Without one, for want of memory, it goes as it is.
            self.compressor = Compressor::new(LEVEL).ok();
        }
        let packed = self.compressor.as_mut()?.compress(piece).ok()?;
        let whole = piece.len() as f64;
        self.tried = Some(Tried {
            cost: began.elapsed().as_secs_f64() / whole,
            left: packed.len() as f64 / whole,
        });
        self.since = 0;
        (packed.len() < piece.len()).then_some(packed)
    }

    fn pays(&mut self) -> bool {
        match self.when {
            Compression::Measured => {}
            #[cfg(test)]
            Compression::Always => return true,
        }
        let Connection {
            given,
            bytes,
            seconds,
        } = self.connection;
        if given < CLEAR || bytes >= FAST * seconds {
            return false;
        }
        let whole = seconds / bytes;
        self.since += 1;
        match self.tried {
            Some(Tried { cost, left }) if cost + left * whole >= whole => self.since >= AGAIN,
            _ => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which of these pieces are compressed when the connection takes this many bytes per second.
    fn packed(pieces: &[&[u8]], rate: f64) -> Vec<bool> {
        let mut packer = Packer::new(Compression::Measured);
        let mut packed = Vec::new();
        for piece in pieces {
            let shorter = packer.pack(piece);
            let bytes = shorter.as_ref().map_or(piece.len(), Vec::len);
            packer.taken(bytes, Duration::from_secs_f64(bytes as f64 / rate));
            packed.push(shorter.is_some());
        }
        packed
    }

    fn noise() -> Vec<u8> {
        let mut noise = vec![0; 1 << 20];
        getrandom::fill(&mut noise).unwrap();
        noise
    }

    #[test]
    fn only_what_gets_shorter_is_compressed_and_only_for_a_slow_connection() {
        let (zeros, noise) = (vec![0; 1 << 20], noise());
        // Unless a processor compresses a MiB of zeros in more than the 10 s that it takes here.
        let slow = 1e5;
        let all = packed(&[&zeros[..]; 8], slow);
        assert_eq!(all, [false, false, false, false, true, true, true, true]);
        assert!(packed(&[&noise[..]; 8], slow).iter().all(|packed| !packed));
        assert!(
            packed(&[&zeros[..]; 8], FAST * 2.0)
                .iter()
                .all(|packed| !packed)
        );
    }

    #[test]
    fn what_gets_shorter_again_is_found() {
        let (zeros, noise) = (vec![0; 1 << 20], noise());
        let mut pieces = vec![&noise[..]; 6];
        pieces.extend([&zeros[..]; AGAIN as usize]);
        let packed = packed(&pieces, 1e6);
        assert!(packed[..6].iter().all(|packed| !packed));
        assert!(packed.last().unwrap());
    }
}
