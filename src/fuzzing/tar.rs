//! Archives, as Podman's reader understands them.
//!
//! Podman is written in Go, and reads archives with Go's `archive/tar`. What livemig lets pass to Podman
//! ([`vetted`](mod@crate::bundle::vetted)) it has to understand in the same way, so this follows that
//! reader's rules (`reader.go`, `strconv.go`), as far as they say which entries there are.

const BLOCK: usize = 512;
/// Extended headers beyond this are refused (`maxSpecialFileSize`).
const LARGEST_SPECIAL: u64 = 1 << 20;

/// An entry: its name, its type flag, the length of its content.
pub(crate) type Entry = (Vec<u8>, u8, u64);

/// What Podman makes of an archive; none if it refuses it.
pub(crate) fn as_podman_reads(archive: &[u8]) -> Option<Vec<Entry>> {
    let mut entries = Vec::new();
    let mut at = 0;
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    loop {
        let Some(block) = archive.get(at..at + BLOCK) else {
            // The end of the data at the end of an entry is an end as well.
            return (at == archive.len()).then_some(entries);
        };
        at += BLOCK;
        if block.iter().all(|byte| *byte == 0) {
            let second = archive.get(at..at + BLOCK);
            let ends = second.is_none_or(|block| block.iter().all(|byte| *byte == 0));
            return ends.then_some(entries);
        }
        let sum = number(&block[148..156])?;
        let bytes = || block.iter().enumerate();
        let blank = |at: usize, byte: u8| match at {
            148..156 => b' ',
            _ => byte,
        };
        let unsigned: i64 = bytes().map(|(at, byte)| i64::from(blank(at, *byte))).sum();
        let signed: i64 = bytes()
            .map(|(at, byte)| i64::from(blank(at, *byte) as i8))
            .sum();
        if sum != unsigned && sum != signed {
            return None;
        }
        let flag = block[156];
        let mut size = number(&block[124..136])?;
        let mut name = text(&block[..100]).to_vec();
        if &block[257..263] == b"ustar\0" {
            let star = &block[508..] == b"tar\0";
            let prefix = text(&block[345..if star { 345 + 131 } else { 500 }]);
            if !prefix.is_empty() {
                name = [prefix, b"/", &name].concat();
            }
        }
        if flag == b'x' {
            let length = usize::try_from(size).ok()?;
            if length as u64 > LARGEST_SPECIAL {
                return None;
            }
            records = pax(archive.get(at..at + length)?)?;
            at += padded(length as u64)?;
            continue;
        }
        // Names of GNU's, headers for all that follows, sparse files: never let through.
        if matches!(flag, b'L' | b'K' | b'g' | b'S') {
            return None;
        }
        for (key, value) in std::mem::take(&mut records) {
            match key.as_slice() {
                // What is empty keeps what the header says.
                _ if value.is_empty() => {}
                b"path" => name = value,
                b"size" => size = std::str::from_utf8(&value).ok()?.parse().ok()?,
                _ if key.starts_with(b"GNU.sparse.") => return None,
                _ => {}
            }
        }
        let size = match flag {
            b'1'..=b'6' => 0,
            _ => u64::try_from(size).ok()?,
        };
        entries.push((name, flag, size));
        at = at.checked_add(padded(size)?)?;
        if at > archive.len() {
            return None;
        }
    }
}

/// Sets the sum of every header right, so that changed archives are still archives: headers are where
/// `size` of the one before says.
pub(crate) fn with_right_sums(archive: &[u8], size: impl Fn(&[u8]) -> Option<u64>) -> Vec<u8> {
    let mut archive = archive.to_vec();
    let mut at = 0;
    while let Some(block) = archive.get_mut(at..at + BLOCK) {
        at += BLOCK;
        if block.iter().all(|byte| *byte == 0) {
            break;
        }
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let length = match block[156] {
            b'1'..=b'6' => 0,
            _ => size(&block[124..136]).unwrap_or(0),
        };
        let Some(next) = padded(length).and_then(|length| at.checked_add(length)) else {
            break;
        };
        at = next;
    }
    archive
}

/// The length of content with what fills it up to whole blocks.
fn padded(size: u64) -> Option<usize> {
    usize::try_from(size.checked_next_multiple_of(BLOCK as u64)?).ok()
}

/// `parseNumeric`: octal digits between blanks and zero bytes, or 256 as base.
pub(crate) fn number(field: &[u8]) -> Option<i64> {
    if field.first().is_some_and(|first| first & 0x80 != 0) {
        let inverted = if field[0] & 0x40 != 0 { 0xff } else { 0 };
        let mut value: u64 = 0;
        for (at, byte) in field.iter().enumerate() {
            let byte = (byte ^ inverted) & if at == 0 { 0x7f } else { 0xff };
            if value >> 56 > 0 {
                return None;
            }
            value = value << 8 | u64::from(byte);
        }
        let value = i64::try_from(value).ok()?;
        return Some(if inverted == 0 { value } else { !value });
    }
    let outer = |byte: &u8| matches!(byte, b' ' | 0);
    let begin = field.iter().position(|byte| !outer(byte));
    let Some(begin) = begin else {
        return Some(0);
    };
    let end = field.iter().rposition(|byte| !outer(byte))?;
    let digits = text(&field[begin..=end]);
    if !digits.iter().all(|byte| (b'0'..=b'7').contains(byte)) {
        return None;
    }
    let digits = std::str::from_utf8(digits).ok()?;
    // It is the bits that are kept.
    Some(u64::from_str_radix(digits, 8).ok()?.cast_signed())
}

/// `parsePAX`.
fn pax(mut content: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records = Vec::new();
    while !content.is_empty() {
        let blank = content.iter().position(|byte| *byte == b' ')?;
        let length: i64 = std::str::from_utf8(&content[..blank]).ok()?.parse().ok()?;
        let length = usize::try_from(length).ok().filter(|length| *length >= 5)?;
        let record = content.get(blank + 1..length)?.strip_suffix(b"\n")?;
        let equals = record.iter().position(|byte| *byte == b'=')?;
        let (key, value) = (&record[..equals], &record[equals + 1..]);
        let text = [&b"path"[..], b"linkpath", b"uname", b"gname"].contains(&key);
        if (if text { value } else { key }).contains(&0) {
            return None;
        }
        records.push((key.to_vec(), value.to_vec()));
        content = &content[length..];
    }
    Some(records)
}

fn text(field: &[u8]) -> &[u8] {
    let end = field.iter().position(|byte| *byte == 0);
    &field[..end.unwrap_or(field.len())]
}
