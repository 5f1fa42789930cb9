//! The little of the tar format that livemig writes and reads itself.
//!
//! It is written here rather than through a library because what is needed is at the edges: PAX
//! records of names and extended attributes that are any bytes at all, sparse files in the one
//! form that Podman's reader takes for a regular file, and a reader ([`walker`](super::walker)) that
//! sees headers go by in a stream without owning it.
//!
//! Sources: POSIX.1-2017 `pax` (ustar and extended headers), the GNU tar manual's "Storing Sparse
//! Files" (PAX format 1.0), and Go's `archive/tar`, which is what Podman reads with.

use std::io::{self, Write};

/// Tar counts in blocks of this many bytes.
pub(super) const BLOCK: usize = 512;

/// Go's reader refuses extended headers and sparse maps that are larger (`maxSpecialFileSize`).
pub(super) const MAX_EXTENDED: usize = 1 << 20;

/// The largest number that eleven octal digits hold: the fields for sizes and times.
const MAX_OCTAL_11: u64 = 0o777_7777_7777;
/// The largest number that seven octal digits hold: the fields for users, groups and devices.
const MAX_OCTAL_7: u64 = 0o777_7777;
/// The room for a name in a header.
pub(super) const NAME_FIELD: usize = 100;

/// How many bytes of padding follow content of this length.
pub(super) fn padding(length: u64) -> usize {
    // The remainder is below 512, so the conversion is exact.
    (length.wrapping_neg() % BLOCK as u64) as usize
}

/// A moment, in seconds and nanoseconds since 1970.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Moment {
    pub seconds: i64,
    pub nanoseconds: u32,
}

impl Moment {
    /// As a PAX record has it: decimal seconds with a fraction.
    fn record(self) -> String {
        if self.nanoseconds == 0 {
            return self.seconds.to_string();
        }
        // Before 1970 the fraction counts towards the later second, but is written as if it
        // counted away from zero.
        let (sign, seconds, nanoseconds) = if self.seconds < 0 {
            let seconds = self.seconds.saturating_add(1).unsigned_abs();
            (
                "-",
                seconds,
                1_000_000_000 - self.nanoseconds.min(999_999_999),
            )
        } else {
            ("", self.seconds.unsigned_abs(), self.nanoseconds)
        };
        let text = format!("{sign}{seconds}.{nanoseconds:09}");
        text.trim_end_matches('0').to_owned()
    }

    /// What a PAX record says; `None` if it is no moment.
    pub fn parse(text: &[u8]) -> Option<Moment> {
        let text = std::str::from_utf8(text).ok()?;
        let (sign, text) = match text.strip_prefix('-') {
            Some(text) => (-1, text),
            None => (1, text),
        };
        let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
        let digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
        if seconds.is_empty() || !digits(seconds) || !digits(fraction) || fraction.len() > 9 {
            return None;
        }
        let seconds: i64 = seconds.parse().ok()?;
        let nanoseconds: u32 = format!("{fraction:0<9}").parse().ok()?;
        let seconds = seconds * sign;
        Some(if sign < 0 && nanoseconds > 0 {
            Moment {
                seconds: seconds - 1,
                nanoseconds: 1_000_000_000 - nanoseconds,
            }
        } else {
            Moment {
                seconds,
                nanoseconds,
            }
        })
    }
}

/// What sort of thing an entry is: the type flag of its header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Type {
    Regular,
    HardLink,
    Symlink,
    Character,
    Block,
    Directory,
    Fifo,
    /// Nothing is to be at that path. livemig's own: POSIX leaves capital letters to everybody.
    Removal,
}

impl Type {
    fn flag(self) -> u8 {
        match self {
            Type::Regular => b'0',
            Type::HardLink => b'1',
            Type::Symlink => b'2',
            Type::Character => b'3',
            Type::Block => b'4',
            Type::Directory => b'5',
            Type::Fifo => b'6',
            Type::Removal => b'W',
        }
    }

    /// `None` if it is none of those that livemig writes.
    pub fn of(flag: u8) -> Option<Type> {
        [
            Type::Regular,
            Type::HardLink,
            Type::Symlink,
            Type::Character,
            Type::Block,
            Type::Directory,
            Type::Fifo,
            Type::Removal,
        ]
        .into_iter()
        .find(|kind| kind.flag() == flag)
    }
}

/// A stretch of a sparse file that has data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Extent {
    pub offset: u64,
    pub length: u64,
}

/// The head of an entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head<'a> {
    /// Relative to the root, without a slash at either end; `/` is the root itself.
    pub path: &'a [u8],
    pub kind: Type,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    /// The length of a regular file, holes included.
    pub size: u64,
    pub modified: Moment,
    pub accessed: Option<Moment>,
    /// Where a link leads.
    pub target: &'a [u8],
    /// Major and minor number of a device.
    pub device: (u32, u32),
    pub attributes: &'a [(Vec<u8>, Vec<u8>)],
    /// The data of a sparse file; `None` for a file that is stored whole.
    pub extents: Option<&'a [Extent]>,
}

impl Head<'_> {
    /// The plainest entry there is: an empty file that belongs to root.
    pub fn empty(path: &[u8]) -> Head<'_> {
        Head {
            path,
            kind: Type::Regular,
            mode: 0o600,
            uid: 0,
            gid: 0,
            size: 0,
            modified: Moment::default(),
            accessed: None,
            target: b"",
            device: (0, 0),
            attributes: &[],
            extents: None,
        }
    }

    /// Writes the head, and the map of a sparse file, which fills whole blocks. The content is the
    /// caller's: `size` bytes or the extents one after the other, then [`pad`].
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut records = Vec::new();
        let mut path = self.path.to_vec();
        if self.kind == Type::Directory && path.last() != Some(&b'/') {
            path.push(b'/');
        }
        let mut size = self.size;
        let mut map = Vec::new();
        if let Some(extents) = self.extents {
            map = sparse_map(extents);
            size = map.len() as u64 + extents.iter().map(|e| e.length).sum::<u64>();
            record(&mut records, b"GNU.sparse.major", b"1");
            record(&mut records, b"GNU.sparse.minor", b"0");
            record(&mut records, b"GNU.sparse.name", &path);
            record(
                &mut records,
                b"GNU.sparse.realsize",
                self.size.to_string().as_bytes(),
            );
            path = b"GNUSparseFile.0/entry".to_vec();
        }
        if path.len() > NAME_FIELD {
            record(&mut records, b"path", &path);
        }
        if self.target.len() > NAME_FIELD {
            record(&mut records, b"linkpath", self.target);
        }
        if size > MAX_OCTAL_11 {
            record(&mut records, b"size", size.to_string().as_bytes());
        }
        for (key, id) in [(&b"uid"[..], self.uid), (&b"gid"[..], self.gid)] {
            if u64::from(id) > MAX_OCTAL_7 {
                record(&mut records, key, id.to_string().as_bytes());
            }
        }
        let whole = u64::try_from(self.modified.seconds)
            .ok()
            .filter(|s| *s <= MAX_OCTAL_11);
        if self.modified.nanoseconds != 0 || whole.is_none() {
            record(&mut records, b"mtime", self.modified.record().as_bytes());
        }
        if let Some(accessed) = self.accessed {
            record(&mut records, b"atime", accessed.record().as_bytes());
        }
        for (name, value) in self.attributes {
            let key = [b"SCHILY.xattr.", &name[..]].concat();
            record(&mut records, &key, value);
        }
        if !records.is_empty() {
            let mut header = Header::new(b"PaxHeader", b'x');
            header.number(OFFSET_SIZE, records.len() as u64);
            out.write_all(&header.finish())?;
            out.write_all(&records)?;
            pad(out, records.len() as u64)?;
        }

        let mut header = Header::new(&path[..path.len().min(NAME_FIELD)], self.kind.flag());
        header.short(OFFSET_MODE, u64::from(self.mode & 0o7777));
        header.short(OFFSET_UID, u64::from(self.uid));
        header.short(OFFSET_GID, u64::from(self.gid));
        header.number(OFFSET_SIZE, size);
        header.number(OFFSET_MTIME, whole.unwrap_or(0));
        let target = &self.target[..self.target.len().min(NAME_FIELD)];
        header.0[OFFSET_LINK..OFFSET_LINK + target.len()].copy_from_slice(target);
        header.short(OFFSET_MAJOR, u64::from(self.device.0));
        header.short(OFFSET_MINOR, u64::from(self.device.1));
        out.write_all(&header.finish())?;
        out.write_all(&map)
    }
}

/// Fills the last block of content of this length.
pub(super) fn pad(out: &mut impl Write, length: u64) -> io::Result<()> {
    out.write_all(&[0; BLOCK][..padding(length)])
}

/// Writes the two empty blocks that end an archive.
pub(super) fn end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&[0; 2 * BLOCK])
}

/// The map of a sparse file: the number of extents, then offset and length of each, all decimal
/// and a line each, padded to whole blocks.
fn sparse_map(extents: &[Extent]) -> Vec<u8> {
    let mut map = format!("{}\n", extents.len()).into_bytes();
    for extent in extents {
        map.extend_from_slice(format!("{}\n{}\n", extent.offset, extent.length).as_bytes());
    }
    map.resize(map.len() + padding(map.len() as u64), 0);
    map
}

/// One PAX record: its own length in decimal, a blank, key, `=`, value, newline.
pub(super) fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let rest = 1 + key.len() + 1 + value.len() + 1;
    // The length counts its own digits, so one more digit can make it one digit longer.
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend_from_slice(length.to_string().as_bytes());
    records.push(b' ');
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

pub(super) const OFFSET_MODE: usize = 100;
pub(super) const OFFSET_UID: usize = 108;
pub(super) const OFFSET_GID: usize = 116;
pub(super) const OFFSET_SIZE: usize = 124;
pub(super) const OFFSET_MTIME: usize = 136;
pub(super) const OFFSET_SUM: usize = 148;
pub(super) const OFFSET_TYPE: usize = 156;
pub(super) const OFFSET_LINK: usize = 157;
pub(super) const OFFSET_MAGIC: usize = 257;
pub(super) const OFFSET_MAJOR: usize = 329;
pub(super) const OFFSET_MINOR: usize = 337;
pub(super) const OFFSET_PREFIX: usize = 345;

/// A header block in the making.
struct Header([u8; BLOCK]);

impl Header {
    fn new(name: &[u8], flag: u8) -> Header {
        let mut header = Header([0; BLOCK]);
        header.0[..name.len()].copy_from_slice(name);
        header.0[OFFSET_TYPE] = flag;
        header.0[OFFSET_MAGIC..OFFSET_MAGIC + 8].copy_from_slice(b"ustar\x0000");
        for offset in [
            OFFSET_MODE,
            OFFSET_UID,
            OFFSET_GID,
            OFFSET_MAJOR,
            OFFSET_MINOR,
        ] {
            header.short(offset, 0);
        }
        header.number(OFFSET_SIZE, 0);
        header.number(OFFSET_MTIME, 0);
        header
    }

    /// Seven octal digits; what does not fit stands in a PAX record as well.
    fn short(&mut self, offset: usize, value: u64) {
        let text = format!("{:07o}", value.min(MAX_OCTAL_7));
        self.0[offset..offset + 7].copy_from_slice(text.as_bytes());
    }

    /// Eleven octal digits; what does not fit stands in a PAX record as well.
    fn number(&mut self, offset: usize, value: u64) {
        let text = format!("{:011o}", value.min(MAX_OCTAL_11));
        self.0[offset..offset + 11].copy_from_slice(text.as_bytes());
    }

    fn finish(mut self) -> [u8; BLOCK] {
        let text = format!("{:06o}\0 ", checksum(&self.0));
        self.0[OFFSET_SUM..OFFSET_SUM + 8].copy_from_slice(text.as_bytes());
        self.0
    }
}

/// The sum of a header's bytes, the field for the sum itself counted as blanks.
pub(super) fn checksum(block: &[u8; BLOCK]) -> u64 {
    block
        .iter()
        .enumerate()
        .map(|(at, byte)| {
            if (OFFSET_SUM..OFFSET_SUM + 8).contains(&at) {
                0x20
            } else {
                u64::from(*byte)
            }
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_counts_its_own_length() {
        // 1-digit to 2-digit and 2-digit to 3-digit lengths, where counting the digits adds one.
        for value in 0..1200 {
            let mut records = Vec::new();
            record(&mut records, b"k", &vec![b'v'; value]);
            let blank = records.iter().position(|b| *b == b' ').expect("a blank");
            let length: usize = std::str::from_utf8(&records[..blank])
                .expect("digits")
                .parse()
                .expect("a number");
            assert_eq!(length, records.len());
        }
    }

    #[test]
    fn moments_are_written_as_pax_has_them() {
        let at = |seconds, nanoseconds| {
            Moment {
                seconds,
                nanoseconds,
            }
            .record()
        };
        assert_eq!(at(5, 0), "5");
        assert_eq!(at(5, 120_000_000), "5.12");
        assert_eq!(at(1_700_000_000, 7), "1700000000.000000007");
        // A quarter of a second before 1970 is second -1 plus three quarters.
        assert_eq!(at(-1, 750_000_000), "-0.25");
        assert_eq!(at(-3, 500_000_000), "-2.5");
        for (seconds, nanoseconds) in [
            (5, 0),
            (7, 120_000_000),
            (-1, 750_000_000),
            (-3, 1),
            (-4, 0),
        ] {
            let moment = Moment {
                seconds,
                nanoseconds,
            };
            assert_eq!(Moment::parse(moment.record().as_bytes()), Some(moment));
        }
        for wrong in [
            "",
            "-",
            ".5",
            "1.0000000001",
            "1.-5",
            "+1",
            "1e3",
            "99999999999999999999",
        ] {
            assert_eq!(Moment::parse(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn values_with_newlines_are_read_whole() {
        let mut written = Vec::new();
        record(
            &mut written,
            b"SCHILY.xattr.security.capability",
            b"\x01\n\x00=\n",
        );
        record(&mut written, b"path", b"x");
        let read = super::super::walker::records(&written).expect("well-formed");
        assert_eq!(read[0].1, b"\x01\n\x00=\n");
        assert_eq!(read[1], (&b"path"[..], &b"x"[..]));
    }
}
