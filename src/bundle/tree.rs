//! A directory tree as it is looked at here: beneath its root, and through no symbolic link.
//!
//! What a running container does to its files while they are read can make the result describe no
//! single moment, but cannot lead anywhere else.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Dir, FileType, FsWord, Mode, OFlags, ResolveFlags, Stat, Statx, StatxFlags,
};
use rustix::io::Errno;

use super::archive::Moment;
use super::{Error, Result};

/// How paths are resolved beneath a root, on both sides.
pub(super) const BENEATH: ResolveFlags = ResolveFlags::BENEATH
    .union(ResolveFlags::NO_SYMLINKS)
    .union(ResolveFlags::NO_MAGICLINKS);

/// A directory and what is below it.
#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    path: PathBuf,
}

/// A file of a tree, opened without any right but to look at it.
#[derive(Debug)]
pub(super) struct Node {
    pub fd: OwnedFd,
    pub stat: Stat,
}

/// Device and number of an inode.
pub(super) type Inode = ((u32, u32), u64);

/// What tells that a file is still the same, and as it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    mode: u16,
    pub links: u32,
    pub size: u64,
    device: (u32, u32),
    inode: u64,
    /// When it was made, where the file system knows: inodes' numbers are used again.
    born: Option<Moment>,
    modified: Moment,
    /// When anything about it changed last: content, owner, mode, attributes, links.
    pub changed: Moment,
}

impl Stamp {
    fn of(seen: &Statx) -> Stamp {
        let moment = |at: rustix::fs::StatxTimestamp| Moment {
            seconds: at.tv_sec,
            nanoseconds: at.tv_nsec,
        };
        let has_birth = StatxFlags::from_bits_retain(seen.stx_mask).contains(StatxFlags::BTIME);
        Stamp {
            mode: seen.stx_mode,
            links: seen.stx_nlink,
            size: seen.stx_size,
            device: (seen.stx_dev_major, seen.stx_dev_minor),
            inode: seen.stx_ino,
            born: has_birth.then(|| moment(seen.stx_btime)),
            modified: moment(seen.stx_mtime),
            changed: moment(seen.stx_ctime),
        }
    }

    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.mode.into())
    }

    pub fn inode(&self) -> Inode {
        (self.device, self.inode)
    }

    /// Whether it is the same file, changed or not.
    pub fn is_same_file(&self, other: &Stamp) -> bool {
        (self.device, self.inode, self.born) == (other.device, other.inode, other.born)
    }
}

impl Tree {
    pub fn open(path: &Path) -> Result<Tree> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root =
            rustix::fs::open(path, flags, Mode::empty()).map_err(|e| failed("open", path, e))?;
        Ok(Tree {
            root,
            path: path.to_owned(),
        })
    }

    /// The number that tells the kind of its file system (`linux/magic.h`).
    pub fn magic(&self) -> Result<FsWord> {
        rustix::fs::fstatfs(&self.root)
            .map(|told| told.f_type)
            .map_err(|e| failed("look at the file system of", &self.path, e))
    }

    /// Which file system it is on, among those of this host.
    pub fn device(&self) -> Result<(u32, u32)> {
        self.stamp().map(|stamp| stamp.device)
    }

    /// Has its whole file system written to where it is kept.
    pub fn flush(&self) -> Result<()> {
        self.opened(b"", OFlags::RDONLY | OFlags::DIRECTORY)
            .and_then(rustix::fs::syncfs)
            .map_err(|e| failed("write out the file system of", &self.path, e))
    }

    fn opened(&self, path: &[u8], flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let path = if path.is_empty() { b"." } else { path };
        let flags = flags | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat2(&self.root, path, flags, Mode::empty(), BENEATH)
    }

    /// Looks at a path; `None` if there is nothing.
    pub fn node(&self, path: &[u8]) -> Result<Option<Node>> {
        let fd = match self.opened(path, OFlags::PATH) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
            Err(errno) => return Err(self.failed("open", path, errno)),
        };
        let stat = rustix::fs::fstat(&fd).map_err(|e| self.failed("look at", path, e))?;
        Ok(Some(Node { fd, stat }))
    }

    /// The stamp of the root directory.
    pub fn stamp(&self) -> Result<Stamp> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        rustix::fs::statx(&self.root, c"", AtFlags::EMPTY_PATH, wanted)
            .map(|seen| Stamp::of(&seen))
            .map_err(|e| failed("look at", &self.path, e))
    }

    /// What is in a directory, sorted by name.
    pub fn list(&self, path: &[u8]) -> Result<Vec<(Vec<u8>, Stamp)>> {
        let fd = match self.opened(path, OFlags::RDONLY | OFlags::DIRECTORY) {
            Ok(fd) => fd,
            // Gone since it was seen, in a container that runs.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(Vec::new()),
            Err(errno) => return Err(self.failed("open", path, errno)),
        };
        let failed = |errno| self.failed("list the directory", path, errno);
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        let mut found = Vec::new();
        for entry in Dir::read_from(&fd).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name();
            if name == c"." || name == c".." {
                continue;
            }
            match rustix::fs::statx(&fd, name, AtFlags::SYMLINK_NOFOLLOW, wanted) {
                Ok(seen) => found.push((name.to_bytes().to_vec(), Stamp::of(&seen))),
                Err(Errno::NOENT) => {}
                Err(errno) => return Err(failed(errno)),
            }
        }
        found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
        Ok(found)
    }

    pub fn failed(&self, action: &'static str, path: &[u8], errno: Errno) -> Error {
        self.failed_with(action, path, errno.into())
    }

    pub fn failed_with(&self, action: &'static str, path: &[u8], source: io::Error) -> Error {
        Error::Read {
            action,
            path: self.path.join(OsStr::from_bytes(path)),
            source,
        }
    }
}

impl Node {
    pub fn kind(&self) -> FileType {
        FileType::from_raw_mode(self.stat.st_mode)
    }

    /// A path that leads to exactly this file, also where it is a symbolic link.
    pub fn handle(&self) -> String {
        format!("/proc/self/fd/{}", self.fd.as_raw_fd())
    }

    /// The value of an extended attribute; `None` where there is none.
    pub fn attribute(&self, name: &[u8]) -> rustix::io::Result<Option<Vec<u8>>> {
        let mut value = vec![0; 256];
        loop {
            match rustix::fs::getxattr(self.handle(), name, &mut value[..]) {
                Ok(size) => {
                    value.truncate(size);
                    return Ok(Some(value));
                }
                // The kernel keeps values of at most 64 KiB (XATTR_SIZE_MAX).
                Err(Errno::RANGE) if value.len() < 1 << 16 => value.resize(1 << 16, 0),
                Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
                Err(errno) => return Err(errno),
            }
        }
    }

    /// The names of the extended attributes.
    pub fn attribute_names(&self) -> rustix::io::Result<Vec<Vec<u8>>> {
        let mut list = vec![0; 256];
        loop {
            match rustix::fs::listxattr(self.handle(), &mut list[..]) {
                Ok(size) => {
                    let names = list[..size]
                        .split(|b| *b == 0)
                        .filter(|name| !name.is_empty());
                    let mut names: Vec<_> = names.map(<[u8]>::to_vec).collect();
                    names.sort_unstable();
                    return Ok(names);
                }
                // The kernel lists at most 64 KiB (XATTR_LIST_MAX).
                Err(Errno::RANGE) if list.len() < 1 << 17 => list.resize(list.len() * 4, 0),
                Err(Errno::OPNOTSUPP) => return Ok(Vec::new()),
                Err(errno) => return Err(errno),
            }
        }
    }
}

/// Whether an extended attribute means the same on another host.
pub(super) fn travels(name: &[u8]) -> bool {
    name.starts_with(b"user.")
        || (name.starts_with(b"trusted.") && !name.starts_with(b"trusted.overlay."))
        || name.starts_with(b"system.posix_acl_")
        || name == b"security.capability"
        || name == b"security.ima"
}

fn failed(action: &'static str, path: &Path, errno: Errno) -> Error {
    Error::Read {
        action,
        path: path.to_owned(),
        source: errno.into(),
    }
}
