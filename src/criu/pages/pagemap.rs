//! Lists of pages among CRIU's images: which runs of pages a memory has (`images/pagemap.proto`).

use std::io::Write;

use prost::Message;

use super::Run;

/// `IMG_COMMON_MAGIC` and `PAGEMAP_MAGIC` of CRIU's `magic.h`.
const MAGIC: [u32; 2] = [0x5456_4319, 0x5608_4025];

/// Begins a list of which this file has the pages.
pub(super) fn begin(list: &mut impl Write, pages_id: u32) -> std::io::Result<()> {
    for magic in MAGIC {
        list.write_all(&magic.to_le_bytes())?;
    }
    write(list, &Head { pages_id })
}

/// Adds a run.
pub(super) fn add(list: &mut impl Write, run: Run) -> std::io::Result<()> {
    write(
        list,
        &Entry {
            address: run.address,
            // What CRIU had before it had the field below.
            pages: u32::try_from(run.pages).unwrap_or(u32::MAX),
            in_parent: None,
            flags: Some(run.flags),
            many_pages: Some(run.pages),
        },
    )
}

/// The number of the file that has the pages, and the runs of a list; nothing if it is none.
pub(super) fn read(list: &[u8]) -> Option<(u32, Vec<Run>)> {
    let magic = MAGIC.map(u32::to_le_bytes).concat();
    let mut rest = list.strip_prefix(&magic[..])?;
    let mut next = || {
        let (length, behind) = rest.split_first_chunk::<4>()?;
        let length = usize::try_from(u32::from_le_bytes(*length)).ok()?;
        let (entry, behind) = behind.split_at_checked(length)?;
        rest = behind;
        Some(entry)
    };
    let head = Head::decode(next()?).ok()?;
    let mut runs = Vec::new();
    while let Some(entry) = next() {
        let entry = Entry::decode(entry).ok()?;
        let flags = match (entry.flags, entry.in_parent) {
            (Some(flags), _) => flags,
            (None, Some(true)) => Run::IN_PARENT,
            (None, _) => Run::PRESENT,
        };
        runs.push(Run {
            address: entry.address,
            pages: entry.many_pages.unwrap_or(entry.pages.into()),
            flags,
        });
    }
    rest.is_empty().then_some((head.pages_id, runs))
}

/// A message, with its length in front of it (`pb_write_one` in `criu/protobuf.c`).
fn write(list: &mut impl Write, message: &impl Message) -> std::io::Result<()> {
    let bytes = message.encode_to_vec();
    // Some tens of bytes.
    list.write_all(&(bytes.len() as u32).to_le_bytes())?;
    list.write_all(&bytes)
}

#[derive(Clone, PartialEq, Message)]
struct Head {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Message)]
struct Entry {
    #[prost(uint64, required, tag = "1")]
    address: u64,
    #[prost(uint32, required, tag = "2")]
    pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    many_pages: Option<u64>,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn list(runs: &[(u64, u64, u32)]) -> (Vec<u8>, Vec<Run>) {
        let run = |&(address, pages, flags)| Run {
            address,
            pages,
            flags,
        };
        let runs: Vec<Run> = runs.iter().map(run).collect();
        let mut list = Vec::new();
        begin(&mut list, 7).unwrap();
        for run in &runs {
            add(&mut list, *run).unwrap();
        }
        (list, runs)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn what_is_written_is_read_or_is_no_list(written in proptest::collection::vec((any::<u64>(), any::<u64>(), 0u32..8), 0..8), cut in 1usize..200) {
            let (list, written) = list(&written);
            prop_assert_eq!(read(&list), Some((7, written.clone())));
            let part = &list[..list.len() - cut.min(list.len())];
            if let Some((number, part)) = read(part) {
                prop_assert_eq!(number, 7);
                prop_assert_eq!(&part[..], &written[..part.len()]);
            }
        }

        #[test]
        fn what_is_no_list_has_an_end(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let magic = MAGIC.map(u32::to_le_bytes).concat();
            let list = [magic, bytes].concat();
            prop_assert!(read(&list).is_none_or(|(_, runs)| runs.len() <= list.len()));
        }
    }
}
