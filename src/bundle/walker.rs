//! Reading an archive as it goes by.

use super::archive::{
    BLOCK, MAX_EXTENDED, Moment, NAME_FIELD, OFFSET_GID, OFFSET_LINK, OFFSET_MAGIC, OFFSET_MAJOR,
    OFFSET_MINOR, OFFSET_MODE, OFFSET_MTIME, OFFSET_PREFIX, OFFSET_SIZE, OFFSET_SUM, OFFSET_TYPE,
    OFFSET_UID, Type, checksum, padding,
};

/// A header that went by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Seen {
    pub name: Vec<u8>,
    pub flag: u8,
    /// Bytes of content after it, without the padding.
    pub size: u64,
    header: Box<[u8; BLOCK]>,
    /// What the extended header in front of it says.
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

/// All that a header says of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Details {
    pub kind: Type,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub modified: Moment,
    pub accessed: Option<Moment>,
    /// Where a link leads.
    pub target: Vec<u8>,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    pub attributes: Vec<(Vec<u8>, Vec<u8>)>,
    /// The length of a sparse file, holes included.
    pub sparse: Option<u64>,
}

impl Seen {
    fn record(&self, key: &[u8]) -> Option<&[u8]> {
        // The last one counts.
        let found = self.records.iter().rev().find(|(found, _)| found == key);
        found.map(|(_, value)| &value[..])
    }

    /// Reads the rest of the header; `None` if something in it is not as livemig writes it.
    pub fn details(&self) -> Option<Details> {
        let decimal = |key: &[u8]| {
            let text = self.record(key)?;
            Some(std::str::from_utf8(text).ok().and_then(|t| t.parse().ok()))
        };
        let short = |offset: usize| {
            let value = octal(&self.header[offset..offset + 8])?;
            u32::try_from(value).ok()
        };
        let id = |key: &[u8], offset| match decimal(key) {
            Some(given) => u32::try_from(given?).ok(),
            None => short(offset),
        };
        let modified = match self.record(b"mtime") {
            Some(text) => Moment::parse(text)?,
            None => Moment {
                seconds: i64::try_from(number(&self.header[OFFSET_MTIME..OFFSET_MTIME + 12])?)
                    .ok()?,
                nanoseconds: 0,
            },
        };
        let sparse: Option<u64> = match decimal(b"GNU.sparse.realsize") {
            Some(given) => Some(given?),
            None => None,
        };
        let is_map = self.record(b"GNU.sparse.major") == Some(b"1")
            && self.record(b"GNU.sparse.minor") == Some(b"0");
        if sparse.is_some() != is_map {
            return None;
        }
        let link = &self.header[OFFSET_LINK..OFFSET_LINK + NAME_FIELD];
        Some(Details {
            kind: Type::of(self.flag)?,
            mode: short(OFFSET_MODE)? & 0o7777,
            uid: id(b"uid", OFFSET_UID)?,
            gid: id(b"gid", OFFSET_GID)?,
            modified,
            accessed: match self.record(b"atime") {
                Some(text) => Some(Moment::parse(text)?),
                None => None,
            },
            target: self.record(b"linkpath").unwrap_or(until_nul(link)).to_vec(),
            device: (short(OFFSET_MAJOR)?, short(OFFSET_MINOR)?),
            attributes: self
                .records
                .iter()
                .filter_map(|(key, value)| {
                    let name = key.strip_prefix(b"SCHILY.xattr.")?;
                    Some((name.to_vec(), value.clone()))
                })
                .collect(),
            sparse,
        })
    }
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
    /// The name that GNU's extended header gave the next entry.
    long_name: Option<Vec<u8>>,
    /// What the other kind says of it.
    records: Vec<(Vec<u8>, Vec<u8>)>,
    reader: Reader,
    /// Whether the last header was an extended one.
    extended: bool,
    /// The block that ends an archive has gone by.
    ended: bool,
    /// Why it stopped looking before that.
    fault: Option<&'static str>,
}

/// How much a walker takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reader {
    /// What any reader might.
    Lenient,
    /// What all readers take alike.
    Strict,
    /// What livemig writes for itself: the same, and sparse files.
    Own,
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
            records: Vec::new(),
            reader: Reader::Lenient,
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
            reader: Reader::Strict,
            ..Walker::default()
        }
    }

    /// One for livemig's own archives, which have sparse files and removals.
    pub fn own() -> Walker {
        Walker {
            reader: Reader::Own,
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
        if self.reader != Reader::Lenient && ambiguous {
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
                let mut seen = Seen {
                    name: Vec::new(),
                    flag,
                    size,
                    header: Box::new(*block),
                    records: std::mem::take(&mut self.records),
                };
                if let Some(given) = seen.record(b"size") {
                    let given = decimal(given);
                    if given.is_none() && self.reader != Reader::Lenient {
                        self.state = State::Done;
                        self.fault = Some("a header is ambiguous");
                        return;
                    }
                    seen.size = given.unwrap_or(size);
                }
                // Links, devices, directories and pipes have no content, whatever they say.
                if (b'1'..=b'6').contains(&flag) {
                    seen.size = 0;
                }
                let size = seen.size;
                let long = seen
                    .records
                    .iter()
                    .rfind(|(key, _)| matches!(&key[..], b"path" | b"GNU.sparse.name"))
                    .map(|(_, path)| path.clone());
                seen.name = long
                    .or(self.long_name.take())
                    .unwrap_or_else(|| name(block));
                tell(Step::Entry(seen));
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
        let sparse = |(key, _): &(&[u8], &[u8])| key.starts_with(b"GNU.sparse.");
        if self.reader == Reader::Strict && records.iter().any(sparse) {
            self.state = State::Done;
            self.fault = Some("an entry is sparse");
            return;
        }
        self.records = records
            .into_iter()
            .map(|(key, value)| (key.to_vec(), value.to_vec()))
            .collect();
    }
}

/// The records of a PAX header; `None` if it is malformed.
pub(super) fn records(mut content: &[u8]) -> Option<Vec<(&[u8], &[u8])>> {
    let mut found = Vec::new();
    while !content.is_empty() {
        let blank = content.iter().position(|b| *b == b' ')?;
        let length = usize::try_from(decimal(&content[..blank])?).ok()?;
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

/// A number in octal: digits, behind blanks and in front of blanks and zero bytes, or nothing at all.
///
/// Readers take other forms differently. Digits behind a zero byte are a number to Podman's reader
/// (`parseOctal` in Go's `archive/tar`) and zero to others, and with the size of an entry they differ in
/// what all that follows is. So these are none.
pub(super) fn octal(field: &[u8]) -> Option<u64> {
    let blanks = field.iter().take_while(|byte| **byte == b' ').count();
    let digits = field[blanks..].iter();
    let digits = digits.take_while(|byte| (b'0'..=b'7').contains(*byte));
    let (digits, rest) = field[blanks..].split_at(digits.count());
    if !rest.iter().all(|byte| matches!(byte, b' ' | 0)) {
        return None;
    }
    digits.iter().try_fold(0_u64, |value, digit| {
        value.checked_mul(8)?.checked_add(u64::from(digit - b'0'))
    })
}

/// A number in decimal digits, and nothing else.
fn decimal(text: &[u8]) -> Option<u64> {
    let plain = !text.is_empty() && text.iter().all(u8::is_ascii_digit);
    plain.then(|| std::str::from_utf8(text).ok()?.parse().ok())?
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
    fn a_walker_stops_looking_at_garbage() {
        let mut walker = Walker::default();
        let mut told = 0;
        walker.feed(&[b'z'; 4096], |_| told += 1);
        assert_eq!(told, 0);
    }

    #[test]
    fn a_number_is_what_every_reader_takes_it_for() {
        for (field, number) in [
            (&b"00000001750\0"[..], Some(0o1750)),
            (b"   1750\0 \0  ", Some(0o1750)),
            (b"000000017 50", None),
            (b"\0\0\0", Some(0)),
            (b"      ", Some(0)),
            (b"777777777777", Some(0o777_777_777_777)),
            // Zero to some, and not to others.
            (b"\x0000000001750", None),
            (b" \x001750", None),
            (b"1750\x001750", None),
            (b"+1750\0", None),
            (b"-1750\0", None),
            (b"1759\0", None),
        ] {
            assert_eq!(octal(field), number, "{}", field.escape_ascii());
        }
        for text in [&b""[..], b"+5", b"-5", b" 5", b"5 ", b"0x5"] {
            assert_eq!(decimal(text), None);
        }
    }
}
