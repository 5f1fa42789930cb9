//! CRIU's own account of a dump or a restore: the files `stats-dump` and `stats-restore`.
//!
//! Podman puts `stats-dump` into the archive that it exports ([`crate::bundle::splice`] takes it
//! out as it passes). `stats-restore` it deletes unless it was told to keep its files; asked for
//! `printStats` it answers a restore with the same numbers.
//!
//! Sources: CRIU `images/stats.proto`, `criu/stats.c`, and `STATS_MAGIC` in `criu/include/magic.h`.

use std::path::Path;
use std::time::Duration;

use prost::Message;
use serde::{Deserialize, Serialize};

use super::images::service_entry;
use super::{Error, Result};

/// `STATS_MAGIC` of CRIU's `magic.h`.
const MAGIC: u32 = 0x5709_3306;
/// Statistics are some hundred bytes; anything beyond 64 KiB is something else.
const MAX: usize = 64 << 10;

/// How long the parts of a dump took, and how much memory it wrote.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DumpStats {
    /// Until all processes had stopped.
    pub freezing: Duration,
    /// From then until they were let go or killed. Contains the two below.
    pub frozen: Duration,
    /// Collecting memory.
    pub memory_dump: Duration,
    /// Writing memory.
    pub memory_write: Duration,
    /// Pages looked at.
    pub pages_scanned: u64,
    /// Pages left out because an earlier round has them.
    pub pages_skipped_parent: u64,
    /// Pages written.
    pub pages_written: u64,
    /// Pages that will be fetched later (post-copy).
    pub pages_lazy: u64,
    /// The same for shared memory: pages written.
    pub shared_pages_written: u64,
}

/// How long the parts of a restore took, and how much memory it read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreStats {
    /// Making the processes.
    pub forking: Duration,
    /// All of it, forking included.
    pub restore: Duration,
    /// Pages written into processes.
    pub pages_restored: u64,
    /// Pages compared with what a parent process has.
    pub pages_compared: u64,
    /// Pages that are shared with a parent process until one writes.
    pub pages_skipped_cow: u64,
}

impl DumpStats {
    /// What a CRIU that has dumped says in its working directory, if it has said anything that can be read.
    pub fn of(work: &Path) -> Option<DumpStats> {
        let content = std::fs::read(work.join(DumpStats::IMAGE)).ok()?;
        DumpStats::parse(&content).ok()
    }

    const IMAGE: &str = "stats-dump";

    /// Reads the content of `stats-dump`.
    ///
    /// # Errors
    /// [`Error::Image`] if it is not that.
    pub fn parse(bytes: &[u8]) -> Result<DumpStats> {
        let entry = parse(DumpStats::IMAGE, bytes)?;
        let dump = entry.dump.ok_or_else(|| Error::Image {
            image: DumpStats::IMAGE,
            what: "it has no statistics of a dump".into(),
        })?;
        Ok(DumpStats {
            freezing: microseconds(dump.freezing_time),
            frozen: microseconds(dump.frozen_time),
            memory_dump: microseconds(dump.memdump_time),
            memory_write: microseconds(dump.memwrite_time),
            pages_scanned: dump.pages_scanned,
            pages_skipped_parent: dump.pages_skipped_parent,
            pages_written: dump.pages_written,
            pages_lazy: dump.pages_lazy,
            shared_pages_written: dump.shpages_written.unwrap_or(0),
        })
    }
}

impl RestoreStats {
    /// Reads the content of `stats-restore`.
    ///
    /// # Errors
    /// [`Error::Image`] if it is not that.
    pub fn parse(bytes: &[u8]) -> Result<RestoreStats> {
        const IMAGE: &str = "stats-restore";
        let entry = parse(IMAGE, bytes)?;
        let restore = entry.restore.ok_or_else(|| Error::Image {
            image: IMAGE,
            what: "it has no statistics of a restore".into(),
        })?;
        Ok(RestoreStats {
            forking: microseconds(restore.forking_time),
            restore: microseconds(restore.restore_time),
            pages_restored: restore.pages_restored.unwrap_or(0),
            pages_compared: restore.pages_compared,
            pages_skipped_cow: restore.pages_skipped_cow,
        })
    }
}

fn parse(image: &'static str, bytes: &[u8]) -> Result<StatsEntry> {
    if bytes.len() > MAX {
        return Err(Error::Image {
            image,
            what: "it is too long".into(),
        });
    }
    StatsEntry::decode(service_entry(image, MAGIC, bytes)?).map_err(|e| Error::Image {
        image,
        what: e.to_string(),
    })
}

fn microseconds(time: u32) -> Duration {
    Duration::from_micros(u64::from(time))
}

// The messages of `images/stats.proto`; times are in microseconds.

#[derive(Clone, PartialEq, Message)]
struct StatsEntry {
    #[prost(message, optional, tag = "1")]
    dump: Option<DumpStatsEntry>,
    #[prost(message, optional, tag = "2")]
    restore: Option<RestoreStatsEntry>,
}

#[derive(Clone, PartialEq, Message)]
struct DumpStatsEntry {
    #[prost(uint32, required, tag = "1")]
    freezing_time: u32,
    #[prost(uint32, required, tag = "2")]
    frozen_time: u32,
    #[prost(uint32, required, tag = "3")]
    memdump_time: u32,
    #[prost(uint32, required, tag = "4")]
    memwrite_time: u32,
    #[prost(uint64, required, tag = "5")]
    pages_scanned: u64,
    #[prost(uint64, required, tag = "6")]
    pages_skipped_parent: u64,
    #[prost(uint64, required, tag = "7")]
    pages_written: u64,
    #[prost(uint64, required, tag = "9")]
    pages_lazy: u64,
    #[prost(uint64, optional, tag = "14")]
    shpages_written: Option<u64>,
}

#[derive(Clone, PartialEq, Message)]
struct RestoreStatsEntry {
    #[prost(uint64, required, tag = "1")]
    pages_compared: u64,
    #[prost(uint64, required, tag = "2")]
    pages_skipped_cow: u64,
    #[prost(uint32, required, tag = "3")]
    forking_time: u32,
    #[prost(uint32, required, tag = "4")]
    restore_time: u32,
    #[prost(uint64, optional, tag = "5")]
    pages_restored: Option<u64>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::images::SERVICE_MAGIC;
    use super::*;

    fn image(entry: &StatsEntry) -> Vec<u8> {
        let message = entry.encode_to_vec();
        let mut bytes = Vec::new();
        for number in [SERVICE_MAGIC, MAGIC, message.len() as u32] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(&message);
        bytes
    }

    #[test]
    fn times_are_microseconds() {
        let dump = DumpStatsEntry {
            frozen_time: 70_123,
            pages_written: 3,
            ..Default::default()
        };
        let bytes = image(&StatsEntry {
            dump: Some(dump),
            restore: None,
        });
        let stats = DumpStats::parse(&bytes).expect("parsed");
        assert_eq!(stats.frozen, Duration::from_micros(70_123));
        assert_eq!(stats.pages_written, 3);
        assert!(matches!(
            RestoreStats::parse(&bytes),
            Err(Error::Image { .. })
        ));
    }

    #[test]
    fn restores_are_read_too() {
        let restore = RestoreStatsEntry {
            restore_time: 22_000,
            ..Default::default()
        };
        let bytes = image(&StatsEntry {
            dump: None,
            restore: Some(restore),
        });
        let stats = RestoreStats::parse(&bytes).expect("parsed");
        assert_eq!(stats.restore, Duration::from_millis(22));
    }

    #[test]
    fn other_files_are_refused() {
        let good = image(&StatsEntry {
            dump: Some(DumpStatsEntry::default()),
            restore: None,
        });
        for cut in 0..good.len() {
            assert!(DumpStats::parse(&good[..cut]).is_err(), "{cut} bytes of it");
        }
        let mut other = good.clone();
        other[4] ^= 1;
        assert!(DumpStats::parse(&other).is_err());
        let mut long = good;
        long[11] = 0xff;
        assert!(DumpStats::parse(&long).is_err());
        assert!(DumpStats::parse(&vec![0; MAX + 1]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = DumpStats::parse(&bytes);
            let mut framed = [SERVICE_MAGIC, MAGIC, bytes.len() as u32]
                .iter().flat_map(|n| n.to_le_bytes()).collect::<Vec<u8>>();
            framed.extend_from_slice(&bytes);
            let _ = DumpStats::parse(&framed);
            let _ = RestoreStats::parse(&framed);
        }
    }
}
