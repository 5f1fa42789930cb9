//! What is in a directory tree, and what of it is new.
//!
//! # Where to look
//! A container's root file system is an overlay. Its *upper* directory says **where** something
//! changed; the *merged* mount says **what** is there now. Content, owners, modes and attributes
//! are therefore always taken from the merged view, which makes metadata-only copies
//! (`trusted.overlay.metacopy`) and whiteouts of either kind come out right without knowing their
//! form: a name that the upper directory has and the merged view has not is a deletion. Only
//! directories need a look at the upper directory's own attributes: where
//! `trusted.overlay.opaque` is `y`, or `trusted.overlay.redirect` is set (a renamed directory), the
//! lower layers' directory of that name is hidden, and all that the merged view has below it is
//! taken, wherever it comes from.
//!
//! A volume or `/dev/shm` is a directory like any other: all of it is taken.
//!
//! # What has changed since the last time
//! A scan leaves a [`Snapshot`]: the [`Stamp`] of each name that it found. The next one compares.
//! It asks the kernel once for each name, and reads content only where
//!
//! - the stamp differs, which holds the inode's number, its birth and its change time (`ctime`,
//!   which no program can set): a name whose stamp is the same leads to the same file, unchanged;
//! - or the change time was so close to the snapshot that a later change may have the same
//!   ([`TICK`]);
//! - or the stamp proves nothing, because the file may have been changed **through a mapping**. The
//!   kernel renews the time when a page that is clean is first written to. On file systems that
//!   write pages back, all were clean before the last scan looked ([`Tree::flush`]), so that is
//!   enough. `tmpfs` never writes back and lets programs write unnoticed: there content is compared
//!   by its digest.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::FileType;

use super::archive::Moment;
use super::content::Content;
use super::delta::{Skipped, skipped};
use super::tree::{Inode, Node, Stamp, Tree};
use super::{Error, Result};

/// More names than this are refused: each is held in memory.
pub(super) const MAX_ENTRIES: usize = 4_000_000;
/// Longer paths are refused by Podman's untar, which uses them whole in system calls that take at
/// most 4,096 bytes (`PATH_MAX`), with its own prefix in front.
pub(super) const MAX_PATH: usize = 3_500;
/// File systems take their times from a clock that goes on once in a tick of the kernel: 10 ms at
/// most (`CONFIG_HZ=100`). The rest is room for clocks that are corrected.
const TICK: Duration = Duration::from_millis(100);
/// `TMPFS_MAGIC`, `RAMFS_MAGIC` and `HUGETLBFS_MAGIC` of `linux/magic.h`.
const IN_MEMORY: [u32; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// The directories that one scan looks at.
#[derive(Debug)]
pub(super) struct Place {
    /// What the container sees.
    pub view: Tree,
    /// Where its overlay keeps what it changed; `None` where there is no overlay.
    pub upper: Option<Tree>,
}

impl Place {
    /// The directory whose files change.
    pub fn changing(&self) -> &Tree {
        self.upper.as_ref().unwrap_or(&self.view)
    }

    /// Whether its files can change without leaving a trace in their stamps.
    fn is_in_memory(&self) -> Result<bool> {
        let magic = self.changing().magic()?;
        // The type's width and sign differ between architectures; the numbers have 32 bits.
        #[allow(clippy::unnecessary_cast)]
        Ok(IN_MEMORY.contains(&(magic as u32)))
    }

    /// Whether a directory of the upper layer hides the lower layers' directory of its name.
    fn hides_lower(&self, path: &[u8]) -> Result<bool> {
        let Some(upper) = &self.upper else {
            return Ok(false);
        };
        let Some(node) = upper.node(path)? else {
            return Ok(false);
        };
        let failed = |errno| upper.failed("read the overlay's marks of", path, errno);
        let opaque = node
            .attribute(b"trusted.overlay.opaque")
            .map_err(failed)?
            // "x" stands for a directory that merely has whiteouts of the attribute form in it.
            .is_some_and(|value| value == b"y");
        Ok(opaque
            || node
                .attribute(b"trusted.overlay.redirect")
                .map_err(failed)?
                .is_some())
    }
}

/// A name that the other side has to be told of.
#[derive(Debug)]
pub(super) struct Entry {
    /// Relative to the root, without a slash at either end; empty for the root itself.
    pub path: Box<[u8]>,
    pub what: What,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    /// A directory that is merged with what is there.
    Directory,
    /// A directory that replaces whatever is there.
    FreshDirectory,
    /// Anything else that exists.
    Other,
    /// Another name for the file of that path.
    Link(Box<[u8]>),
    /// Nothing: what the other side has there was removed.
    Deleted,
}

/// What the names of a tree led to, as of one scan.
#[derive(Debug)]
pub(super) struct Snapshot {
    known: HashMap<Box<[u8]>, Known>,
    /// Of regular files' content as it was sent.
    digests: HashMap<Inode, blake3::Hash>,
    /// When the scan began.
    began: Moment,
    /// Whether content is compared by its digest.
    in_memory: bool,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    what: Kept,
    stamp: Stamp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Directory,
    /// A directory below which all of the merged view counts.
    Whole,
    Other,
    Deleted,
}

impl Snapshot {
    /// Whether whoever reads content has to take down its digest.
    pub fn wants_digests(&self) -> bool {
        self.in_memory
    }

    /// Takes down the digest of content that was sent.
    pub fn note(&mut self, path: &[u8], digest: blake3::Hash) {
        if let Some(known) = self.known.get(path) {
            self.digests.insert(known.stamp.inode(), digest);
        }
    }

    /// Takes down that a name leads to the same content as another one that was sent.
    pub fn note_link(&mut self, path: &[u8], first: &[u8]) {
        let digest = self
            .known
            .get(first)
            .and_then(|known| self.digests.get(&known.stamp.inode()));
        if let Some(digest) = digest.copied() {
            self.note(path, digest);
        }
    }

    /// Whether there was nothing in the tree.
    pub fn is_empty(&self) -> bool {
        self.known.keys().all(|path| path.is_empty())
    }

    /// Has the next scan tell of the tree's own directory, whether it has changed or not.
    pub fn forget_root(&mut self) {
        self.known.remove(&b""[..]);
    }

    fn is_racy(&self, stamp: &Stamp) -> bool {
        let at = |moment: Moment| {
            i128::from(moment.seconds) * 1_000_000_000 + i128::from(moment.nanoseconds)
        };
        at(stamp.changed) + TICK.as_nanos() as i128 >= at(self.began)
    }
}

/// What a scan found.
#[derive(Debug)]
pub(super) struct Found {
    /// What the other side has to be told, in this order: deletions of what is gone, then parents
    /// before what they hold, in the order of names.
    pub entries: Vec<Entry>,
    /// How things are now.
    pub snapshot: Snapshot,
    /// What cannot be told.
    pub skipped: Vec<Skipped>,
    /// The length of the regular files among the entries, holes included.
    pub bytes: u64,
}

/// Whether anything moves while a tree is scanned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pace {
    /// Programs are at work, and there will be another scan: what they change unnoticed now has to
    /// be noticed then. Has the file systems written out first, which may take seconds.
    Running,
    /// Nothing moves any more, and time counts.
    Frozen,
}

/// The time now, as it is to be known to [`scan`].
pub(super) fn now() -> Moment {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Moment {
        // Seconds since 1970 stay below 2^63 for a while.
        seconds: now.as_secs() as i64,
        nanoseconds: now.subsec_nanos(),
    }
}

/// Finds what is in a tree, or what has changed in it since an earlier scan. Blocks.
///
/// `began` is a moment before all that the scan looks at: what is written to a page after that was
/// written out has a later time.
///
/// # Errors
/// [`Error::Read`] if something cannot be read, [`Error::TooManyEntries`] beyond four million names.
pub(super) fn scan(place: &Place, before: Option<&Snapshot>, began: Moment) -> Result<Found> {
    let mut scan = Scan {
        place,
        before,
        entries: Vec::new(),
        bytes: 0,
        skipped: Vec::new(),
        links: HashMap::new(),
        buffer: Vec::new(),
        now: Snapshot {
            known: HashMap::with_capacity(before.map_or(0, |before| before.known.len())),
            digests: HashMap::new(),
            began,
            in_memory: place.is_in_memory()?,
        },
    };
    scan.walk()?;
    let gone = scan.gone();
    let Scan {
        mut entries,
        now,
        skipped,
        bytes,
        ..
    } = scan;
    entries.splice(0..0, gone);
    Ok(Found {
        entries,
        snapshot: now,
        skipped,
        bytes,
    })
}

/// A hard-linked file, identified where its identity is reliable: in the upper directory if it has
/// been copied there, else in the merged view.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Identity {
    Upper(u64, u64),
    Merged(u64, u64),
}

/// What holds for all that is in a directory.
#[derive(Debug, Clone, Copy)]
struct Zone {
    /// Everything that the view has counts, wherever it comes from.
    whole: bool,
    /// The other side has nothing of it, whatever it had before.
    fresh: bool,
}

struct Scan<'a> {
    place: &'a Place,
    before: Option<&'a Snapshot>,
    entries: Vec<Entry>,
    bytes: u64,
    skipped: Vec<Skipped>,
    /// The first name of a file with several, and whether the other side is told of it.
    links: HashMap<Identity, (Box<[u8]>, bool)>,
    buffer: Vec<u8>,
    now: Snapshot,
}

impl Scan<'_> {
    /// Walks depth first, parents before what they hold, in the order of names.
    fn walk(&mut self) -> Result<()> {
        let plain = self.place.upper.is_none();
        let zone = Zone {
            whole: plain,
            fresh: plain && self.before.is_none(),
        };
        let root = self.place.changing().stamp()?;
        if self.unchanged(b"", &root, zone).is_none() {
            let what = if zone.fresh {
                What::FreshDirectory
            } else {
                What::Directory
            };
            self.tell(b"", what)?;
        }
        self.keep(b"", Kept::Directory, root);
        // What to look at, the next one last.
        let mut waiting = Vec::new();
        self.list(b"", zone, &mut waiting)?;
        while let Some((path, stamp, zone)) = waiting.pop() {
            if let Some(below) = self.look(&path, stamp, zone)? {
                self.list(&path, below, &mut waiting)?;
            }
        }
        Ok(())
    }

    /// Adds what a directory holds to what is waiting.
    fn list(
        &mut self,
        path: &[u8],
        zone: Zone,
        waiting: &mut Vec<(Vec<u8>, Stamp, Zone)>,
    ) -> Result<()> {
        let tree = if zone.whole {
            &self.place.view
        } else {
            self.place.changing()
        };
        let first = waiting.len();
        for (name, stamp) in tree.list(path)? {
            let child = if path.is_empty() {
                name
            } else {
                [path, b"/", name.as_slice()].concat()
            };
            waiting.push((child, stamp, zone));
        }
        waiting[first..].sort_unstable_by(|a, b| Reverse(&a.0).cmp(&Reverse(&b.0)));
        Ok(())
    }

    /// Looks at one name. If it leads to a directory to go into, says what holds for that.
    fn look(&mut self, path: &[u8], stamp: Stamp, zone: Zone) -> Result<Option<Zone>> {
        if path.len() > MAX_PATH {
            self.skip(
                path,
                "has a path that is too long for Podman's import: left behind",
            );
            return Ok(None);
        }
        if let Some(known) = self.unchanged(path, &stamp, zone) {
            return self.pass(path, stamp, zone, &known);
        }
        let Some(node) = self.place.view.node(path)? else {
            if !zone.whole {
                // All whiteouts of a file system may be one file, and have its stamp.
                if self
                    .known(path, zone)
                    .is_none_or(|k| k.what != Kept::Deleted)
                {
                    self.tell(path, What::Deleted)?;
                }
                self.keep(path, Kept::Deleted, stamp);
            }
            return Ok(None);
        };
        match node.kind() {
            FileType::Directory => self.directory(path, stamp, zone).map(Some),
            FileType::Socket => {
                self.skip(
                    path,
                    "is a socket, which an archive cannot hold: left behind",
                );
                if !zone.whole {
                    // What the image has there is not there.
                    self.tell(path, What::Deleted)?;
                    self.keep(path, Kept::Deleted, stamp);
                }
                Ok(None)
            }
            kind => {
                match self.link(path, &node, true)? {
                    Some((first, _)) => self.tell(path, What::Link(first))?,
                    None => {
                        self.tell(path, What::Other)?;
                        if kind == FileType::RegularFile {
                            self.bytes += u64::try_from(node.stat.st_size).unwrap_or(0);
                        }
                    }
                }
                self.keep(path, Kept::Other, stamp);
                Ok(None)
            }
        }
    }

    /// A directory that is new, or has changed.
    fn directory(&mut self, path: &[u8], stamp: Stamp, zone: Zone) -> Result<Zone> {
        let before = self.known(path, zone);
        let hides = zone.whole || self.place.hides_lower(path)?;
        let was_whole = before.is_some_and(|known| known.what == Kept::Whole);
        // The other side has this very directory, without what it hides.
        let is_there = before.is_some_and(|known| {
            known.what == Kept::Whole && hides && known.stamp.is_same_file(&stamp)
        });
        let (what, below) = if zone.whole {
            (What::Directory, zone)
        } else if is_there {
            let below = Zone {
                whole: true,
                fresh: zone.fresh,
            };
            (What::Directory, below)
        } else if hides || was_whole {
            let below = Zone {
                whole: true,
                fresh: true,
            };
            (What::FreshDirectory, below)
        } else {
            (What::Directory, zone)
        };
        self.tell(path, what)?;
        let kept = if below.whole && !zone.whole {
            Kept::Whole
        } else {
            Kept::Directory
        };
        self.keep(path, kept, stamp);
        Ok(below)
    }

    /// A name that leads to what it led to before.
    fn pass(
        &mut self,
        path: &[u8],
        stamp: Stamp,
        zone: Zone,
        known: &Known,
    ) -> Result<Option<Zone>> {
        let below = match known.what {
            Kept::Directory => Some(zone),
            Kept::Whole => Some(Zone {
                whole: true,
                ..zone
            }),
            Kept::Deleted => None,
            Kept::Other => {
                // Another name of it may be new to the other side, and then this one has to be tied
                // to it.
                if stamp.links > 1
                    && let Some(node) = self.place.view.node(path)?
                    && let Some((first, true)) = self.link(path, &node, false)?
                {
                    self.tell(path, What::Link(first))?;
                }
                None
            }
        };
        self.keep(path, known.what, stamp);
        if let Some(digest) = self.before.and_then(|b| b.digests.get(&stamp.inode())) {
            self.now.digests.insert(stamp.inode(), *digest);
        }
        Ok(below)
    }

    /// What the other side has under that name, as far as it is known.
    fn known(&self, path: &[u8], zone: Zone) -> Option<&Known> {
        self.before
            .filter(|_| !zone.fresh)
            .and_then(|before| before.known.get(path))
    }

    /// What the other side has, if that is still what is here.
    fn unchanged(&mut self, path: &[u8], stamp: &Stamp, zone: Zone) -> Option<Known> {
        let before = self.before?;
        let known = *self.known(path, zone)?;
        if known.stamp != *stamp || before.is_racy(stamp) {
            return None;
        }
        if self.now.in_memory
            && known.what == Kept::Other
            && stamp.kind() == FileType::RegularFile
            && stamp.size > 0
        {
            let node = self.place.view.node(path).ok()??;
            let digest = Content::open(&node).ok()?.digest(&mut self.buffer).ok()?;
            let sent = before.digests.get(&stamp.inode());
            return (sent == Some(&digest)).then_some(known);
        }
        Some(known)
    }

    /// The first name of a file that has several, if this is not the first, and whether the other
    /// side is told of that. Takes this one down otherwise.
    fn link(&mut self, path: &[u8], node: &Node, told: bool) -> Result<Option<(Box<[u8]>, bool)>> {
        let upper = match &self.place.upper {
            Some(upper) => upper.node(path)?,
            None => None,
        };
        // The widths of these fields differ between architectures.
        #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
        let identity = match &upper {
            Some(node) if u64::from(node.stat.st_nlink) > 1 => {
                Identity::Upper(node.stat.st_dev as u64, node.stat.st_ino as u64)
            }
            None if u64::from(node.stat.st_nlink) > 1 => {
                Identity::Merged(node.stat.st_dev as u64, node.stat.st_ino as u64)
            }
            _ => return Ok(None),
        };
        if let Some(first) = self.links.get(&identity) {
            return Ok(Some(first.clone()));
        }
        self.links.insert(identity, (path.into(), told));
        Ok(None)
    }

    /// What the other side has and has to remove, since it is nowhere here: the topmost names.
    fn gone(&self) -> Vec<Entry> {
        let Some(before) = self.before else {
            return Vec::new();
        };
        let is_directory = |path: &[u8]| {
            self.now
                .known
                .get(path)
                .is_some_and(|known| matches!(known.what, Kept::Directory | Kept::Whole))
        };
        let mut gone: Vec<&Box<[u8]>> = before
            .known
            .iter()
            .filter(|(path, known)| {
                known.what != Kept::Deleted && !self.now.known.contains_key(*path)
            })
            .map(|(path, _)| path)
            .filter(|path| {
                let parent = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
                is_directory(&path[..parent])
            })
            .collect();
        gone.sort_unstable();
        gone.into_iter()
            .map(|path| Entry {
                path: path.clone(),
                what: What::Deleted,
            })
            .collect()
    }

    fn tell(&mut self, path: &[u8], what: What) -> Result<()> {
        self.entries.push(Entry {
            path: path.into(),
            what,
        });
        self.within_limit()
    }

    fn keep(&mut self, path: &[u8], what: Kept, stamp: Stamp) {
        let known = Known { what, stamp };
        self.now.known.insert(path.into(), known);
    }

    fn within_limit(&self) -> Result<()> {
        if self.now.known.len().max(self.entries.len()) > MAX_ENTRIES {
            return Err(Error::TooManyEntries { limit: MAX_ENTRIES });
        }
        Ok(())
    }

    fn skip(&mut self, path: &[u8], why: &str) {
        self.skipped.push(skipped(path, why));
    }
}
