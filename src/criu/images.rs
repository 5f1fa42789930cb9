//! The frame around CRIU's image files.
//!
//! A service image begins with two magic numbers and has one entry: its length and a protobuf
//! message. All numbers have four bytes, least significant first. (CRIU `criu/include/magic.h`,
//! `open_image_at` in `criu/image.c`, `pb_write_one` in `criu/protobuf.c`.)

use super::{Error, Result};

/// `IMG_SERVICE_MAGIC`: what files that are not part of a checkpoint proper begin with.
pub(super) const SERVICE_MAGIC: u32 = 0x5510_5940;

/// The message in a service image that has this second magic number.
pub(super) fn service_entry<'a>(
    image: &'static str,
    magic: u32,
    bytes: &'a [u8],
) -> Result<&'a [u8]> {
    let malformed = |what: &str| Error::Image {
        image,
        what: what.into(),
    };
    let (first, rest) = number(bytes).ok_or_else(|| malformed("it is too short"))?;
    if first != SERVICE_MAGIC {
        return Err(malformed(
            "it does not begin with the number of CRIU's service files",
        ));
    }
    let (second, rest) = number(rest).ok_or_else(|| malformed("it is too short"))?;
    if second != magic {
        return Err(malformed("it is another kind of image"));
    }
    let (length, rest) = number(rest).ok_or_else(|| malformed("it has no entry"))?;
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    rest.get(..length)
        .ok_or_else(|| malformed("its entry is cut short"))
}

fn number(bytes: &[u8]) -> Option<(u32, &[u8])> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*number), rest))
}
