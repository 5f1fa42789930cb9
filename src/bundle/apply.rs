//! Changed files, brought into the trees that a prepared container has at the destination.
//!
//! # What is read
//! A tar archive in the POSIX form that [`changes`](super::changes) writes. Names are
//! `rootfs/PATH`, `shm/PATH` and `volumes/NAME/PATH`. An entry of type `W` says that there is
//! nothing at its path (and, with an empty path, nothing in the tree); every other one replaces what
//! is there, except that a directory stays where there is one. Directories come before what is in
//! them. It can be brought in twice: the second time changes nothing.
//!
//! # Why it can be trusted with a stranger's archive
//! It runs as root, and the archive is what another host says it is.
//!
//! - A path is names separated by single slashes; `.`, `..` and empty names are refused. The kernel
//!   resolves it beneath the tree's root and through no symbolic link and into no other mount
//!   (`openat2(2)`), whatever entries before it have made. Only the last name is then acted on,
//!   in a directory that is open.
//! - Nothing that exists is ever written to: it is removed, and made new with `O_EXCL`.
//! - A hard link's target is resolved in the same way, in the same tree.
//! - Only attributes that mean something on every host are set; the overlay's own are refused.
//! - Devices are refused unless the caller wants them.
//! - Numbers of entries and bytes have limits. An entry's head takes 1 MiB at most; content is
//!   written as it comes.
//!
//! What it cannot judge is the content: a program in a container's root file system is whatever the
//! other host says it is, with whatever mode.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use bytes::Bytes;
use futures::{Stream, TryStreamExt};
use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Timespec, Timestamps, Uid,
    XattrFlags,
};
use rustix::io::Errno;
use tokio::sync::mpsc;

use super::archive::{Extent, MAX_EXTENDED, Moment, Type};
use super::changes::TreeId;
use super::content::MAX_EXTENTS;
use super::delta::Skipped;
use super::scan::{MAX_ENTRIES, MAX_PATH};
use super::tree::{BENEATH, Node, Tree, travels};
use super::walker::{Details, Seen, Step, Walker};
use super::{Error, Result};

/// A name is not longer than this (`NAME_MAX`).
const MAX_NAME: usize = 255;
/// No more than this many attributes that a file system does not know are told of.
const MAX_SKIPPED: usize = 1000;

/// What an archive may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The most entries.
    pub entries: u64,
    /// The most bytes of content, holes not counted.
    pub bytes: u64,
    /// Whether it may make device nodes.
    pub devices: bool,
}

impl Default for Limits {
    /// Four million entries, 16 TiB, no devices.
    fn default() -> Self {
        Limits {
            entries: MAX_ENTRIES as u64,
            bytes: 16 << 40,
            devices: false,
        }
    }
}

/// What was brought in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Applied {
    /// Entries that made or kept something, removals not counted.
    pub entries: u64,
    /// Bytes of content.
    pub bytes: u64,
    /// Entries that said that there is nothing, whether there was or not.
    pub removals: u64,
    /// Attributes that this host's file systems do not know.
    pub skipped: Vec<Skipped>,
}

/// Why an entry is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// It does not begin with the name of a tree that it may write to.
    #[error("it belongs to no tree of this container")]
    NoTree,
    /// Absolute, or with `.`, `..`, or nothing between two slashes, or a zero byte.
    #[error("its path is no plain path below its tree")]
    Path,
    /// Longer than 3,500 bytes in all, or 255 in one name.
    #[error("its path is too long")]
    LongPath,
    /// Something on the way is a symbolic link.
    #[error("its path leads through a symbolic link")]
    ThroughLink,
    /// Something on the way is a mount.
    #[error("its path leads out of its tree")]
    OutOfTree,
    /// A hard link to something that is not below the same tree.
    #[error("it is a hard link to something that is not in its tree")]
    LinkTarget,
    /// A device node.
    #[error("it is a device")]
    Device,
    /// An attribute that is not for other hosts to set.
    #[error("it has an attribute that may not be set")]
    Attribute,
    /// Something in its head is not as livemig writes it.
    #[error("its head is not as livemig writes it")]
    Head,
    /// The map of a sparse file is not one.
    #[error("its map of holes is damaged")]
    Map,
    /// The tree's own directory can be nothing else.
    #[error("it would replace the root directory of its tree")]
    Root,
}

/// Brings an archive in, beside the runtime's threads, as it comes.
///
/// `targets` says where a tree is: for the root file system its *merged* mount, so that the overlay
/// keeps its own books.
///
/// # Errors
/// [`Error::Entry`] if an entry is refused, [`Error::Apply`] if this host cannot do what it says,
/// [`Error::TooManyEntries`] and [`Error::TooLong`] beyond the limits, [`Error::Malformed`] if it is
/// no archive of livemig's, [`Error::Truncated`] if it has no end; those of the stream. What came
/// before stays: the caller gives the container up.
pub async fn apply<S, T>(archive: S, targets: T, limits: Limits) -> Result<Applied>
where
    S: Stream<Item = Result<Bytes>> + Send,
    T: FnMut(&TreeId) -> Option<PathBuf> + Send + 'static,
{
    let (sender, mut receiver) = mpsc::channel::<Bytes>(4);
    let writing = tokio::task::spawn_blocking(move || {
        let mut applier = Applier::new(targets, limits);
        while let Some(piece) = receiver.blocking_recv() {
            applier.feed(&piece)?;
        }
        applier.finish()
    });
    let mut archive = std::pin::pin!(archive);
    let passed = async {
        while let Some(piece) = archive.try_next().await? {
            if sender.send(piece).await.is_err() {
                // It has failed, and says why.
                break;
            }
        }
        Ok(())
    }
    .await;
    drop(sender);
    let written = match writing.await {
        Ok(written) => written,
        Err(lost) => Err(Error::Write(io::Error::other(lost))),
    };
    passed.and(written)
}

/// Has the trees that an archive was brought into written to where they are kept, beside the
/// runtime's threads. It may take seconds.
///
/// What is not written out is lost when the host's power fails; once the source has removed its
/// container, for good. A root file system is given by its merged mount, which passes it on.
///
/// # Errors
/// [`Error::Read`] if a tree is not there or its file system fails.
pub async fn persist(trees: Vec<PathBuf>) -> Result<()> {
    let task = tokio::task::spawn_blocking(move || {
        let mut flushed = std::collections::HashSet::new();
        for path in trees {
            let tree = Tree::open(&path)?;
            if flushed.insert(tree.device()?) {
                tree.flush()?;
            }
        }
        Ok(())
    });
    match task.await {
        Ok(done) => done,
        Err(lost) => Err(Error::Write(io::Error::other(lost))),
    }
}

/// Brings an archive in, piece by piece. Blocks.
pub(crate) struct Applier<T> {
    walker: Walker,
    applying: Applying<T>,
    /// Bytes of archive so far.
    seen: u64,
}

impl<T> fmt::Debug for Applier<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Applier")
            .field("walker", &self.walker)
            .field("applied", &self.applying.applied)
            .finish_non_exhaustive()
    }
}

impl<T: FnMut(&TreeId) -> Option<PathBuf>> Applier<T> {
    pub fn new(targets: T, limits: Limits) -> Applier<T> {
        Applier {
            walker: Walker::own(),
            applying: Applying {
                targets,
                limits,
                roots: HashMap::new(),
                parent: None,
                open: None,
                applied: Applied::default(),
            },
            seen: 0,
        }
    }

    /// Acts on the next piece. After an error it must not be used again.
    pub fn feed(&mut self, piece: &[u8]) -> Result<()> {
        let Applier {
            walker,
            applying,
            seen,
        } = self;
        *seen += piece.len() as u64;
        let mut result = Ok(());
        walker.feed(piece, |step| {
            if result.is_ok() {
                result = match step {
                    Step::Entry(seen) => applying.entry(&seen),
                    Step::Content(content) => applying.content(content),
                };
            }
        });
        match (result, walker.fault()) {
            (Ok(()), Some(what)) => Err(Error::Malformed { what }),
            (result, _) => result,
        }
    }

    /// The archive has come to its end, if it has.
    pub fn finish(mut self) -> Result<Applied> {
        if !self.walker.has_ended() {
            return Err(Error::Truncated { bytes: self.seen });
        }
        self.applying.leave()?;
        Ok(self.applying.applied)
    }
}

struct Applying<T> {
    targets: T,
    limits: Limits,
    roots: HashMap<TreeId, OwnedFd>,
    /// The directory of the last entry.
    parent: Option<Parent>,
    /// The file whose content is coming.
    open: Option<Open>,
    applied: Applied,
}

/// A directory in which something is done, which is not to show in its times.
struct Parent {
    tree: TreeId,
    path: Vec<u8>,
    fd: OwnedFd,
    times: Timestamps,
}

/// A file whose content is coming.
struct Open {
    file: File,
    name: Name,
    details: Details,
    filling: Filling,
    /// Bytes of content that have not come yet, the map included.
    left: u64,
}

enum Filling {
    Whole {
        at: u64,
    },
    /// Of a sparse file's map so far, and the lines in it.
    Map {
        text: Vec<u8>,
        lines: usize,
    },
    /// The end of the block that the map ended in.
    Padding {
        left: usize,
        extents: Vec<Extent>,
    },
    /// The extents that are not filled yet, the next one last.
    Sparse(Vec<Extent>),
}

/// Where an entry goes.
#[derive(Debug, Clone)]
struct Name {
    tree: TreeId,
    /// Relative to the root, without a slash at either end; empty for the root itself.
    path: Vec<u8>,
}

impl Name {
    fn read(name: &[u8], kind: Type) -> Result<Name, Refusal> {
        let (tree, path) = TreeId::split(name).ok_or(Refusal::NoTree)?;
        let path = match kind {
            Type::Directory if !path.is_empty() => path.strip_suffix(b"/").ok_or(Refusal::Head)?,
            _ => path,
        };
        if path.len() > MAX_PATH {
            return Err(Refusal::LongPath);
        }
        if !path.is_empty() {
            for part in path.split(|byte| *byte == b'/') {
                if matches!(part, b"" | b"." | b"..") || part.contains(&0) {
                    return Err(Refusal::Path);
                }
                if part.len() > MAX_NAME {
                    return Err(Refusal::LongPath);
                }
            }
        }
        Ok(Name {
            tree,
            path: path.to_vec(),
        })
    }

    /// The directory's path and the name in it.
    fn parts(&self) -> (&[u8], &[u8]) {
        match self.path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => (&self.path[..slash], &self.path[slash + 1..]),
            None => (b"", &self.path),
        }
    }

    fn refused(&self, why: Refusal) -> Error {
        Error::Entry {
            name: self.to_string(),
            why,
        }
    }

    fn failed(&self, action: &'static str, errno: Errno) -> Error {
        match errno {
            Errno::LOOP => self.refused(Refusal::ThroughLink),
            Errno::XDEV => self.refused(Refusal::OutOfTree),
            _ => Error::Apply {
                action,
                name: self.to_string(),
                source: errno.into(),
            },
        }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = String::from_utf8_lossy(&self.path);
        write!(f, "/{} in the {}", path.escape_debug(), self.tree)
    }
}

impl<T: FnMut(&TreeId) -> Option<PathBuf>> Applying<T> {
    fn entry(&mut self, seen: &Seen) -> Result<()> {
        let refused = |why| Error::Entry {
            name: String::from_utf8_lossy(&seen.name)
                .escape_debug()
                .to_string(),
            why,
        };
        if self.applied.entries + self.applied.removals >= self.limits.entries {
            return Err(Error::TooManyEntries {
                limit: usize::try_from(self.limits.entries).unwrap_or(usize::MAX),
            });
        }
        let details = seen.details().ok_or_else(|| refused(Refusal::Head))?;
        let name = Name::read(&seen.name, details.kind).map_err(refused)?;
        if details.kind != Type::Regular && (seen.size > 0 || details.sparse.is_some()) {
            return Err(refused(Refusal::Head));
        }
        if !details.attributes.iter().all(|(name, _)| travels(name)) {
            return Err(refused(Refusal::Attribute));
        }
        let device = matches!(details.kind, Type::Character | Type::Block);
        if device && !self.limits.devices {
            return Err(refused(Refusal::Device));
        }
        self.root(&name)?;
        if name.path.is_empty() {
            return match details.kind {
                Type::Removal => self.empty(&name),
                Type::Directory => self.root_directory(&name, &details),
                _ => Err(refused(Refusal::Root)),
            };
        }
        match details.kind {
            Type::Removal => self.removal(&name),
            Type::Directory => self.directory(&name, &details),
            Type::Regular => self.regular(name, details, seen.size),
            Type::HardLink => self.hard_link(&name, &details),
            Type::Symlink | Type::Character | Type::Block | Type::Fifo => {
                self.special(&name, &details)
            }
        }
    }

    /// The root of the entry's tree.
    fn root(&mut self, name: &Name) -> Result<BorrowedFd<'_>> {
        use std::collections::hash_map::Entry;
        let root = match self.roots.entry(name.tree.clone()) {
            Entry::Occupied(there) => there.into_mut(),
            Entry::Vacant(free) => {
                let path =
                    (self.targets)(&name.tree).ok_or_else(|| name.refused(Refusal::NoTree))?;
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let root =
                    rustix::fs::open(&path, flags, Mode::empty()).map_err(|errno| Error::Read {
                        action: "open",
                        path,
                        source: errno.into(),
                    })?;
                free.insert(root)
            }
        };
        Ok(OwnedFd::as_fd(root))
    }

    /// The directory that the entry is in, opened. What is done in it does not show in its times.
    fn enter(&mut self, name: &Name) -> Result<()> {
        let (directory, _) = name.parts();
        let is_here =
            |parent: &Parent| parent.tree == name.tree && parent.path.as_slice() == directory;
        if self.parent.as_ref().is_some_and(is_here) {
            return Ok(());
        }
        self.leave()?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let fd = beneath(self.root(name)?, directory, flags)
            .map_err(|e| name.failed("open the directory of", e))?;
        let stat =
            rustix::fs::fstat(&fd).map_err(|e| name.failed("look at the directory of", e))?;
        let (modified, accessed) = super::entries::times(&stat);
        self.parent = Some(Parent {
            tree: name.tree.clone(),
            path: directory.to_vec(),
            fd,
            times: timestamps(modified, accessed),
        });
        Ok(())
    }

    /// Done with the directory of the last entry.
    fn leave(&mut self) -> Result<()> {
        let Some(parent) = self.parent.take() else {
            return Ok(());
        };
        rustix::fs::futimens(&parent.fd, &parent.times).map_err(|e| {
            let name = Name {
                tree: parent.tree,
                path: parent.path,
            };
            name.failed("set the times of", e)
        })
    }

    /// The directory of the entry, which [`enter`](Self::enter) has opened.
    fn directory_of(&mut self, name: &Name) -> Result<BorrowedFd<'_>> {
        self.enter(name)?;
        match &self.parent {
            Some(parent) => Ok(parent.fd.as_fd()),
            None => Err(name.failed("open the directory of", Errno::NOENT)),
        }
    }

    fn removal(&mut self, name: &Name) -> Result<()> {
        self.applied.removals += 1;
        match self.directory_of(name) {
            Ok(directory) => {
                remove(directory, name.parts().1).map_err(|e| name.failed("remove", e))
            }
            // Gone with its directory.
            Err(Error::Apply { source, .. })
                if matches!(
                    source.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
                ) =>
            {
                Ok(())
            }
            Err(other) => Err(other),
        }
    }

    /// Removes all that a tree has.
    fn empty(&mut self, name: &Name) -> Result<()> {
        self.applied.removals += 1;
        self.leave()?;
        let root = self.root(name)?;
        let all = beneath(root, b"", OFlags::RDONLY | OFlags::DIRECTORY);
        all.and_then(|all| clear(&all))
            .map_err(|e| name.failed("empty", e))
    }

    fn root_directory(&mut self, name: &Name, details: &Details) -> Result<()> {
        self.leave()?;
        let fd = beneath(self.root(name)?, b"", OFlags::PATH | OFlags::DIRECTORY)
            .map_err(|e| name.failed("open", e))?;
        self.dress(name, &node(name, fd)?, details)
    }

    fn directory(&mut self, name: &Name, details: &Details) -> Result<()> {
        let (_, last) = name.parts();
        let directory = self.directory_of(name)?;
        let there = rustix::fs::statat(directory, last, AtFlags::SYMLINK_NOFOLLOW);
        let stays =
            there.is_ok_and(|there| FileType::from_raw_mode(there.st_mode) == FileType::Directory);
        if !stays {
            remove(directory, last).map_err(|e| name.failed("replace", e))?;
            rustix::fs::mkdirat(directory, last, Mode::RWXU).map_err(|e| name.failed("make", e))?;
        }
        self.dress_made(name, details)
    }

    fn regular(&mut self, name: Name, details: Details, size: u64) -> Result<()> {
        let (_, last) = name.parts();
        let directory = self.directory_of(&name)?;
        remove(directory, last).map_err(|e| name.failed("replace", e))?;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(directory, last, flags, Mode::RUSR | Mode::WUSR)
            .map_err(|e| name.failed("make", e))?;
        let filling = match details.sparse {
            Some(_) => Filling::Map {
                text: Vec::new(),
                lines: 0,
            },
            None => Filling::Whole { at: 0 },
        };
        let open = Open {
            file: File::from(fd),
            name,
            details,
            filling,
            left: size,
        };
        if size == 0 {
            return self.filled(open);
        }
        self.open = Some(open);
        Ok(())
    }

    fn content(&mut self, content: &[u8]) -> Result<()> {
        let Some(open) = &mut self.open else {
            return Ok(());
        };
        let length = content.len() as u64;
        // Maps count as well: they are never long.
        self.applied.bytes = self.applied.bytes.saturating_add(length);
        if self.applied.bytes > self.limits.bytes {
            return Err(Error::TooLong {
                limit: self.limits.bytes,
            });
        }
        open.left = open.left.saturating_sub(length);
        open.fill(content)?;
        if open.left == 0
            && let Some(open) = self.open.take()
        {
            return self.filled(open);
        }
        Ok(())
    }

    /// All content of a file has come.
    fn filled(&mut self, open: Open) -> Result<()> {
        let Open {
            file,
            name,
            details,
            filling,
            ..
        } = open;
        if let Some(size) = details.sparse {
            let complete = match filling {
                Filling::Sparse(left) => left.is_empty(),
                Filling::Padding { left, extents } => left == 0 && extents.is_empty(),
                Filling::Whole { .. } | Filling::Map { .. } => false,
            };
            if !complete {
                return Err(name.refused(Refusal::Map));
            }
            file.set_len(size).map_err(|source| Error::Apply {
                action: "make the holes of",
                name: name.to_string(),
                source,
            })?;
        }
        let node = node(&name, OwnedFd::from(file))?;
        self.dress(&name, &node, &details)
    }

    fn hard_link(&mut self, name: &Name, details: &Details) -> Result<()> {
        let target = Name::read(&details.target, Type::HardLink)
            .map_err(|_| name.refused(Refusal::LinkTarget))?;
        if target.tree != name.tree || target.path.is_empty() || target.path == name.path {
            return Err(name.refused(Refusal::LinkTarget));
        }
        let (of_target, last_of_target) = target.parts();
        let flags = OFlags::PATH | OFlags::DIRECTORY;
        let of_target = beneath(self.root(name)?, of_target, flags)
            .map_err(|e| name.failed("find the target of", e))?;
        let (_, last) = name.parts();
        let directory = self.directory_of(name)?;
        remove(directory, last).map_err(|e| name.failed("replace", e))?;
        // Without AT_SYMLINK_FOLLOW: a link to a symbolic link is one to the link itself.
        rustix::fs::linkat(
            &of_target,
            last_of_target,
            directory,
            last,
            AtFlags::empty(),
        )
        .map_err(|e| name.failed("link", e))?;
        self.applied.entries += 1;
        Ok(())
    }

    fn special(&mut self, name: &Name, details: &Details) -> Result<()> {
        let (_, last) = name.parts();
        let directory = self.directory_of(name)?;
        remove(directory, last).map_err(|e| name.failed("replace", e))?;
        let mode = Mode::RUSR | Mode::WUSR;
        let device = rustix::fs::makedev(details.device.0, details.device.1);
        match details.kind {
            Type::Symlink => rustix::fs::symlinkat(&details.target[..], directory, last),
            Type::Fifo => rustix::fs::mknodat(directory, last, FileType::Fifo, mode, 0),
            Type::Block => {
                rustix::fs::mknodat(directory, last, FileType::BlockDevice, mode, device)
            }
            _ => rustix::fs::mknodat(directory, last, FileType::CharacterDevice, mode, device),
        }
        .map_err(|e| name.failed("make", e))?;
        self.dress_made(name, details)
    }

    /// Gives what has just been made, or kept, its metadata.
    fn dress_made(&mut self, name: &Name, details: &Details) -> Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = self.directory_of(name)?;
        let fd = rustix::fs::openat(directory, name.parts().1, flags, Mode::empty())
            .map_err(|e| name.failed("open", e))?;
        self.dress(name, &node(name, fd)?, details)
    }

    /// Gives a file its owner, mode, attributes and times, in this order: a change of the owner takes
    /// the set-user-ID bit and capabilities away, and everything changes times.
    fn dress(&mut self, name: &Name, node: &Node, details: &Details) -> Result<()> {
        let owner = Some(Uid::from_raw(details.uid));
        let group = Some(Gid::from_raw(details.gid));
        rustix::fs::chownat(&node.fd, c"", owner, group, AtFlags::EMPTY_PATH)
            .map_err(|e| name.failed("set the owner of", e))?;
        let handle = node.handle();
        if node.kind() != FileType::Symlink {
            rustix::fs::chmod(&handle, Mode::from_raw_mode(details.mode))
                .map_err(|e| name.failed("set the mode of", e))?;
        }
        let failed = |errno| name.failed("set the attributes of", errno);
        // A directory that stays has old ones, and what is made inherits its directory's ACL.
        for old in node.attribute_names().map_err(failed)? {
            let stays = details.attributes.iter().any(|(name, _)| *name == old);
            if travels(&old) && !stays {
                rustix::fs::removexattr(&handle, &old[..]).map_err(failed)?;
            }
        }
        for (attribute, value) in &details.attributes {
            match rustix::fs::setxattr(&handle, &attribute[..], value, XattrFlags::empty()) {
                Err(Errno::OPNOTSUPP) => {
                    if self.applied.skipped.len() < MAX_SKIPPED {
                        let attribute = String::from_utf8_lossy(attribute);
                        self.applied.skipped.push(Skipped {
                            path: name.to_string(),
                            why: format!("lost its attribute {attribute}, which this file system does not know"),
                        });
                    }
                }
                other => other.map_err(failed)?,
            }
        }
        let accessed = details.accessed.unwrap_or(details.modified);
        let times = timestamps(details.modified, accessed);
        rustix::fs::utimensat(CWD, &handle, &times, AtFlags::empty())
            .map_err(|e| name.failed("set the times of", e))?;
        self.applied.entries += 1;
        Ok(())
    }
}

impl Open {
    fn fill(&mut self, mut content: &[u8]) -> Result<()> {
        while !content.is_empty() {
            match &mut self.filling {
                Filling::Whole { at } => {
                    put(&self.file, content, *at, &self.name)?;
                    *at += content.len() as u64;
                    return Ok(());
                }
                Filling::Map { text, lines } => {
                    let byte = content[0];
                    content = &content[1..];
                    text.push(byte);
                    if text.len() > MAX_EXTENDED {
                        return Err(self.name.refused(Refusal::Map));
                    }
                    if byte != b'\n' {
                        continue;
                    }
                    *lines += 1;
                    let size = self.details.sparse.unwrap_or(0);
                    let left = self.left + content.len() as u64;
                    let read = map(text, *lines, size, left);
                    if let Some((extents, padding)) =
                        read.map_err(|()| self.name.refused(Refusal::Map))?
                    {
                        self.filling = Filling::Padding {
                            left: padding,
                            extents,
                        };
                    }
                }
                Filling::Padding { left, extents } => {
                    let skipped = content.len().min(*left);
                    content = &content[skipped..];
                    *left -= skipped;
                    if *left == 0 {
                        self.filling = Filling::Sparse(std::mem::take(extents));
                    }
                }
                Filling::Sparse(extents) => {
                    let Some(extent) = extents.last_mut() else {
                        return Err(self.name.refused(Refusal::Map));
                    };
                    let most = usize::try_from(extent.length).unwrap_or(usize::MAX);
                    let (piece, rest) = content.split_at(content.len().min(most));
                    put(&self.file, piece, extent.offset, &self.name)?;
                    content = rest;
                    extent.offset += piece.len() as u64;
                    extent.length -= piece.len() as u64;
                    if extent.length == 0 {
                        extents.pop();
                    }
                }
            }
        }
        Ok(())
    }
}

fn put(file: &File, content: &[u8], at: u64, name: &Name) -> Result<()> {
    file.write_all_at(content, at)
        .map_err(|source| Error::Apply {
            action: "write to",
            name: name.to_string(),
            source,
        })
}

/// The map of a sparse file, once it is complete: its extents, the last one first and none that is
/// empty, and how much padding follows it. `size` is the file's length, `left` what follows the map.
fn map(
    text: &[u8],
    lines: usize,
    size: u64,
    left: u64,
) -> Result<Option<(Vec<Extent>, usize)>, ()> {
    /// The digits of the largest number.
    const DIGITS: usize = 20;
    // Looked at when it can be complete: the first line says how many there are. It is read again with
    // each line, so it may not be long.
    let first = text.iter().take(DIGITS + 1).position(|byte| *byte == b'\n');
    let first = first.ok_or(())?;
    let number = |text: &[u8]| -> Result<u64, ()> {
        let plain = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
        let text = std::str::from_utf8(text).map_err(|_| ())?;
        text.parse().ok().filter(|_| plain).ok_or(())
    };
    let count = usize::try_from(number(&text[..first])?).map_err(|_| ())?;
    if count > MAX_EXTENTS + 1 {
        return Err(());
    }
    if lines < 1 + 2 * count {
        return Ok(None);
    }
    let numbers: Vec<u64> = text[first + 1..]
        .split(|byte| *byte == b'\n')
        .take(2 * count)
        .map(number)
        .collect::<Result<_, ()>>()?;
    let mut extents = Vec::with_capacity(count);
    let (mut end, mut data) = (0_u64, 0_u64);
    for pair in numbers.chunks_exact(2) {
        let (offset, length) = (pair[0], pair[1]);
        if offset < end {
            return Err(());
        }
        end = offset.checked_add(length).ok_or(())?;
        data = data.checked_add(length).ok_or(())?;
        if length > 0 {
            extents.push(Extent { offset, length });
        }
    }
    let padding = super::archive::padding(text.len() as u64);
    if end > size || data.checked_add(padding as u64) != Some(left) {
        return Err(());
    }
    extents.reverse();
    Ok(Some((extents, padding)))
}

/// Opens a path beneath a root, through no symbolic link and into no other mount.
fn beneath(root: BorrowedFd<'_>, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let path = if path.is_empty() { b"." } else { path };
    let resolve = BENEATH | ResolveFlags::NO_XDEV;
    rustix::fs::openat2(root, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

fn node(name: &Name, fd: OwnedFd) -> Result<Node> {
    let stat = rustix::fs::fstat(&fd).map_err(|e| name.failed("look at", e))?;
    Ok(Node { fd, stat })
}

/// Removes what has that name in a directory, with all that is in it. Nothing there is fine.
fn remove(directory: BorrowedFd<'_>, name: &[u8]) -> rustix::io::Result<()> {
    match rustix::fs::unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => {
            clear(&beneath(
                directory,
                name,
                OFlags::RDONLY | OFlags::DIRECTORY,
            )?)?;
            rustix::fs::unlinkat(directory, name, AtFlags::REMOVEDIR)
        }
        Err(errno) => Err(errno),
    }
}

/// Removes all that is in a directory. Never more than two directories are open, however deep it is.
fn clear(directory: &OwnedFd) -> rustix::io::Result<()> {
    let mut waiting = vec![Vec::new()];
    while let Some(path) = waiting.last().cloned() {
        let here = beneath(directory.as_fd(), &path, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let before = waiting.len();
        for entry in Dir::read_from(&here)? {
            let entry = entry?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            match rustix::fs::unlinkat(&here, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(Errno::ISDIR) => {
                    let name = name.to_bytes();
                    waiting.push(if path.is_empty() {
                        name.to_vec()
                    } else {
                        [&path[..], b"/", name].concat()
                    });
                }
                Err(errno) => return Err(errno),
            }
        }
        if waiting.len() > before {
            continue;
        }
        waiting.pop();
        if !path.is_empty() {
            let (above, name) = match path.iter().rposition(|byte| *byte == b'/') {
                Some(slash) => (&path[..slash], &path[slash + 1..]),
                None => (&b""[..], &path[..]),
            };
            let above = beneath(directory.as_fd(), above, OFlags::PATH | OFlags::DIRECTORY)?;
            rustix::fs::unlinkat(&above, name, AtFlags::REMOVEDIR)?;
        }
    }
    Ok(())
}

fn timestamps(modified: Moment, accessed: Moment) -> Timestamps {
    let at = |moment: Moment| Timespec {
        tv_sec: moment.seconds,
        tv_nsec: moment.nanoseconds.into(),
    };
    Timestamps {
        last_access: at(accessed),
        last_modification: at(modified),
    }
}

#[cfg(test)]
#[path = "apply_tests.rs"]
mod tests;
