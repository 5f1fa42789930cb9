//! The little of the tar format that livemig writes and reads itself.
//!
//! It is written here rather than through a library because what is needed is at the edges: PAX
//! records of names and extended attributes that are any bytes at all, sparse files in the one
//! form that Podman's reader takes for a regular file, and a reader that sees headers go by in a
//! stream without owning it.
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
const NAME_FIELD: usize = 100;

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
        }
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
fn record(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
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

const OFFSET_MODE: usize = 100;
const OFFSET_UID: usize = 108;
const OFFSET_GID: usize = 116;
const OFFSET_SIZE: usize = 124;
const OFFSET_MTIME: usize = 136;
const OFFSET_SUM: usize = 148;
const OFFSET_TYPE: usize = 156;
const OFFSET_LINK: usize = 157;
const OFFSET_MAGIC: usize = 257;
const OFFSET_MAJOR: usize = 329;
const OFFSET_MINOR: usize = 337;
const OFFSET_PREFIX: usize = 345;

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
fn checksum(block: &[u8; BLOCK]) -> u64 {
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

/// A header that went by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub name: Vec<u8>,
    pub flag: u8,
    /// Bytes of content after it, without the padding.
    pub size: u64,
}

/// What a [`Walker`] found at a point of the stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Step<'a> {
    /// An entry begins.
    Entry(Seen),
    /// The next piece of the entry's content.
    Content(&'a [u8]),
}

/// Follows the headers of an archive that goes by in pieces of any size.
///
/// It holds one header or extended header at a time and no content. Once it meets something that
/// is no tar header it stops looking, for good: whether an archive is sound is for its reader to
/// say, not for someone who only looks on.
#[derive(Debug)]
pub(super) struct Walker {
    state: State,
    /// Name and size that extended headers gave the next entry.
    long_name: Option<Vec<u8>>,
    long_size: Option<u64>,
    /// Whether it takes only what all readers take alike.
    strict: bool,
    /// Whether the last header was an extended one.
    extended: bool,
    /// The block that ends an archive has gone by.
    ended: bool,
    /// Why it stopped looking before that.
    fault: Option<&'static str>,
}

#[derive(Debug)]
enum State {
    /// Collecting a header block.
    Header(Vec<u8>),
    /// Collecting an extended header (`x`, or GNU's `L`) of so many bytes and so much padding.
    Extended {
        flag: u8,
        content: Vec<u8>,
        size: usize,
        padding: usize,
    },
    /// Passing content.
    Content { left: u64, padding: usize },
    /// Passing padding, or the content of headers that mean nothing here.
    Skip { left: u64 },
    /// At the end, or lost.
    Done,
}

impl Default for Walker {
    fn default() -> Self {
        Walker {
            state: State::Header(Vec::new()),
            long_name: None,
            long_size: None,
            strict: false,
            extended: false,
            ended: false,
            fault: None,
        }
    }
}

impl Walker {
    /// One that takes only headers of which no two readers make different things.
    pub fn strict() -> Walker {
        Walker {
            strict: true,
            ..Walker::default()
        }
    }

    /// Whether the archive has come to its end.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    /// Why it stopped looking before the end, if it did.
    pub fn fault(&self) -> Option<&'static str> {
        self.fault
    }

    /// Looks at the next piece, telling of entries and content in order.
    pub fn feed<'a>(&mut self, mut piece: &'a [u8], mut tell: impl FnMut(Step<'a>)) {
        while !piece.is_empty() {
            match &mut self.state {
                State::Done => return,
                State::Skip { left } => {
                    let taken = take(&mut piece, *left);
                    *left -= taken.len() as u64;
                    if *left == 0 {
                        self.state = State::Header(Vec::new());
                    }
                }
                State::Content { left, padding } => {
                    let taken = take(&mut piece, *left);
                    *left -= taken.len() as u64;
                    tell(Step::Content(taken));
                    if *left == 0 {
                        self.state = after(*padding as u64);
                    }
                }
                State::Extended {
                    flag,
                    content,
                    size,
                    padding,
                } => {
                    let taken = take(&mut piece, (*size - content.len()) as u64);
                    content.extend_from_slice(taken);
                    if content.len() == *size {
                        let (flag, content, padding) = (*flag, std::mem::take(content), *padding);
                        self.state = after(padding as u64);
                        self.extended(flag, &content);
                    }
                }
                State::Header(block) => {
                    let taken = take(&mut piece, (BLOCK - block.len()) as u64);
                    block.extend_from_slice(taken);
                    if let Ok(block) = <[u8; BLOCK]>::try_from(&block[..]) {
                        self.header(&block, &mut tell);
                    }
                }
            }
        }
    }

    fn header<'a>(&mut self, block: &[u8; BLOCK], tell: &mut impl FnMut(Step<'a>)) {
        self.state = State::Done;
        let sum = octal(&block[OFFSET_SUM..OFFSET_SUM + 8]);
        if block.iter().all(|byte| *byte == 0) {
            self.ended = true;
            return;
        }
        self.fault = Some("a header is damaged");
        if sum != Some(checksum(block)) {
            return;
        }
        let Some(size) = number(&block[OFFSET_SIZE..OFFSET_SIZE + 12]) else {
            return;
        };
        let flag = block[OFFSET_TYPE];
        // Readers differ in what a long name of GNU's applies to, whether a global header counts,
        // and which of two extended headers; and in whether there is a prefix before a name.
        let ambiguous = matches!(flag, b'L' | b'K' | b'g')
            || (flag == b'x' && self.extended)
            || (&block[257..263] != b"ustar\0" && block[345] != 0);
        if self.strict && ambiguous {
            self.fault = Some("a header is ambiguous");
            return;
        }
        self.extended = flag == b'x';
        match flag {
            b'x' | b'L' => {
                let Ok(size) = usize::try_from(size) else {
                    return;
                };
                if size > MAX_EXTENDED {
                    return;
                }
                self.fault = None;
                let padding = padding(size as u64);
                self.state = State::Extended {
                    flag,
                    content: Vec::new(),
                    size,
                    padding,
                };
                if size == 0 {
                    self.state = State::Header(Vec::new());
                }
            }
            b'g' | b'K' => {
                self.fault = None;
                self.state = after(size.saturating_add(padding(size) as u64));
            }
            _ => {
                self.fault = None;
                let size = self.long_size.take().unwrap_or(size);
                // Links, devices, directories and pipes have no content, whatever they say.
                let size = if (b'1'..=b'6').contains(&flag) {
                    0
                } else {
                    size
                };
                let name = self.long_name.take().unwrap_or_else(|| name(block));
                tell(Step::Entry(Seen { name, flag, size }));
                self.state = if size == 0 {
                    State::Header(Vec::new())
                } else {
                    State::Content {
                        left: size,
                        padding: padding(size),
                    }
                };
            }
        }
    }

    fn extended(&mut self, flag: u8, content: &[u8]) {
        if flag == b'L' {
            self.long_name = Some(until_nul(content).to_vec());
            return;
        }
        let Some(records) = records(content) else {
            self.state = State::Done;
            self.fault = Some("an extended header is damaged");
            return;
        };
        for (key, value) in records {
            if self.strict && key.starts_with(b"GNU.sparse.") {
                self.state = State::Done;
                self.fault = Some("an entry is sparse");
                return;
            }
            match key {
                b"path" | b"GNU.sparse.name" => self.long_name = Some(value.to_vec()),
                b"size" => {
                    self.long_size = std::str::from_utf8(value).ok().and_then(|v| v.parse().ok());
                }
                _ => {}
            }
        }
    }
}

/// The records of a PAX header; `None` if it is malformed.
pub(super) fn records(mut content: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut found = Vec::new();
    while !content.is_empty() {
        let blank = content.iter().position(|b| *b == b' ')?;
        let length: usize = std::str::from_utf8(&content[..blank]).ok()?.parse().ok()?;
        let record = content.get(blank + 1..length)?;
        let record = record.strip_suffix(b"\n")?;
        let equals = record.iter().position(|b| *b == b'=')?;
        found.push((&record[..equals], &record[equals + 1..]));
        content = &content[length..];
    }
    Some(found)
}

fn after(padding: u64) -> State {
    if padding == 0 {
        State::Header(Vec::new())
    } else {
        State::Skip { left: padding }
    }
}

fn take<'a>(piece: &mut &'a [u8], most: u64) -> &'a [u8] {
    let length = usize::try_from(most).map_or(piece.len(), |most| most.min(piece.len()));
    let (taken, rest) = piece.split_at(length);
    *piece = rest;
    taken
}

fn until_nul(field: &[u8]) -> &[u8] {
    field.split(|b| *b == 0).next().unwrap_or_default()
}

fn name(block: &[u8; BLOCK]) -> Vec<u8> {
    let name = until_nul(&block[..NAME_FIELD]);
    let prefix = until_nul(&block[OFFSET_PREFIX..OFFSET_PREFIX + 155]);
    if block[OFFSET_MAGIC..].starts_with(b"ustar\0") && !prefix.is_empty() {
        [prefix, b"/", name].concat()
    } else {
        name.to_vec()
    }
}

pub(super) fn octal(field: &[u8]) -> Option<u64> {
    let text = std::str::from_utf8(until_nul(field))
        .ok()?
        .trim_matches(' ');
    if text.is_empty() {
        Some(0)
    } else {
        u64::from_str_radix(text, 8).ok()
    }
}

/// A number in octal, or in GNU's base 256, which sets the first bit.
fn number(field: &[u8]) -> Option<u64> {
    match field {
        [first, rest @ ..] if first & 0x80 != 0 => rest
            .iter()
            .try_fold(u64::from(first & 0x7f), |value, byte| {
                value.checked_mul(256)?.checked_add(u64::from(*byte))
            }),
        _ => octal(field),
    }
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
        let read = records(&written).expect("well-formed");
        assert_eq!(read[0].1, b"\x01\n\x00=\n");
        assert_eq!(read[1], (&b"path"[..], &b"x"[..]));
    }

    #[test]
    fn a_walker_stops_looking_at_garbage() {
        let mut walker = Walker::default();
        let mut told = 0;
        walker.feed(&[b'z'; 4096], |_| told += 1);
        assert_eq!(told, 0);
    }
}
