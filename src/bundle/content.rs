//! The content of a regular file: its stretches of data, without the holes.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::archive::Extent;
use super::tree::Node;

/// Holes that are smaller in all are read as zeros.
const MIN_HOLES: u64 = 64 << 10;
/// With more extents the sparse map would come near [`MAX_EXTENDED`](super::archive::MAX_EXTENDED):
/// small holes are filled. One more says where the file ends.
pub(super) const MAX_EXTENTS: usize = 16_384;
/// Content is read in pieces of this size.
pub(super) const COPY: usize = 256 << 10;

/// A file that is about to be read.
#[derive(Debug)]
pub(super) struct Content {
    file: File,
    pub size: u64,
    /// Where there is data, if there are holes to speak of.
    pub extents: Option<Vec<Extent>>,
}

/// What reading came to.
#[derive(Debug)]
pub(super) struct Done {
    /// Bytes that were passed on.
    pub bytes: u64,
    /// Whether the file had become shorter meanwhile: its end was filled with zeros.
    pub short: bool,
}

impl Content {
    /// Opens a regular file, and looks for its holes.
    pub fn open(node: &Node) -> rustix::io::Result<Content> {
        let size = u64::try_from(node.stat.st_size).unwrap_or(0);
        let open = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        // Reading must not count as an access, where that can be had.
        let fd = match rustix::fs::open(node.handle(), open | OFlags::NOATIME, Mode::empty()) {
            Err(Errno::PERM) => rustix::fs::open(node.handle(), open, Mode::empty()),
            other => other,
        }?;
        let file = File::from(fd);
        // st_blocks counts 512 bytes each, whatever the file system's blocks are.
        let allocated = u64::try_from(node.stat.st_blocks)
            .unwrap_or(0)
            .saturating_mul(512);
        let extents = if allocated < size {
            extents(&file, size)?
        } else {
            None
        };
        Ok(Content {
            file,
            size,
            extents,
        })
    }

    /// Reads all data in order, and passes exactly as much on as was promised when it was opened.
    /// Errors of reading come back as the outer one.
    pub fn read<E>(
        mut self,
        buffer: &mut Vec<u8>,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> io::Result<Result<Done, E>> {
        buffer.resize(COPY, 0);
        let whole = [Extent {
            offset: 0,
            length: self.size,
        }];
        let mut done = Done {
            bytes: 0,
            short: false,
        };
        for stretch in self.extents.as_deref().unwrap_or(&whole) {
            if self.extents.is_some() {
                self.file.seek(SeekFrom::Start(stretch.offset))?;
            }
            let mut left = stretch.length;
            while left > 0 {
                let most = usize::try_from(left).map_or(COPY, |left| left.min(COPY));
                let mut got = most;
                if !done.short {
                    got = match self.file.read(&mut buffer[..most]) {
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                        got => got?,
                    };
                    done.short = got == 0;
                }
                if done.short {
                    got = most;
                    buffer[..got].fill(0);
                }
                if let Err(error) = each(&buffer[..got]) {
                    return Ok(Err(error));
                }
                left -= got as u64;
                done.bytes += got as u64;
            }
        }
        Ok(Ok(done))
    }

    /// A digest that has begun with where the data is, so that two files have the same only if both
    /// that and the data are.
    pub fn begun_digest(&self) -> blake3::Hasher {
        let mut digest = blake3::Hasher::new();
        digest.update(&self.size.to_le_bytes());
        for extent in self.extents.iter().flatten() {
            digest.update(&extent.offset.to_le_bytes());
            digest.update(&extent.length.to_le_bytes());
        }
        digest
    }

    /// The digest of the whole.
    pub fn digest(self, buffer: &mut Vec<u8>) -> io::Result<blake3::Hash> {
        let mut digest = self.begun_digest();
        let read = self.read(buffer, |piece| {
            digest.update(piece);
            Ok::<_, std::convert::Infallible>(())
        })?;
        match read {
            Ok(_) => Ok(digest.finalize()),
            Err(never) => match never {},
        }
    }
}

/// The stretches of a file that have data, or `None` if it has too few holes to bother.
fn extents(file: &File, size: u64) -> rustix::io::Result<Option<Vec<Extent>>> {
    let mut extents = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(at)) {
            Ok(start) if start < size => start,
            // No data behind this point.
            Ok(_) | Err(Errno::NXIO) => break,
            // This file system does not tell.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => {
                rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
                return Ok(None);
            }
            Err(errno) => return Err(errno),
        };
        let end = rustix::fs::seek(file, rustix::fs::SeekFrom::Hole(start))?.clamp(start, size);
        if end == start {
            break;
        }
        extents.push(Extent {
            offset: start,
            length: end - start,
        });
        at = end;
        if extents.len() > 2 * MAX_EXTENTS {
            fill_small_holes(&mut extents);
        }
    }
    fill_small_holes(&mut extents);
    let data: u64 = extents.iter().map(|e| e.length).sum();
    if size - data < MIN_HOLES {
        rustix::fs::seek(file, rustix::fs::SeekFrom::Start(0))?;
        return Ok(None);
    }
    // A hole at the end is told by an extent without length behind it.
    if extents
        .last()
        .is_none_or(|last| last.offset + last.length < size)
    {
        extents.push(Extent {
            offset: size,
            length: 0,
        });
    }
    Ok(Some(extents))
}

/// Joins extents over ever larger holes until there are few enough.
pub(super) fn fill_small_holes(extents: &mut Vec<Extent>) {
    let mut hole = 4096;
    while extents.len() > MAX_EXTENTS {
        hole *= 2;
        extents.dedup_by(|next, last| {
            let near = next.offset - (last.offset + last.length) < hole;
            if near {
                last.length = next.offset + next.length - last.offset;
            }
            near
        });
    }
}
