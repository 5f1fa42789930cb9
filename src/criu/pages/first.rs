//! The pages that a container touches first, which go with its images when the rest of its memory is fetched later.
//!
//! Each page that a container has to wait for crosses the network by itself, twice: as a request and as an answer.
//! What it touches first are its stacks and the data of its libraries, which are short runs of pages; what it
//! works on is long, but at its ends may be others that the kernel has put beside it. So the shortest runs and the
//! ends of long ones are asked of CRIU before anybody else asks, and are put into the images as pages that need not
//! be fetched.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::fetch::answered;
use super::{Layout, Memory, Run, page_size, pagemap};
use crate::criu::{Error, Result};

/// So many pages at most: 1 MiB, which crosses while CRIU makes a process.
const FIRST: u64 = 256;
/// As much of a long run is an end: 8 pages.
const END: u64 = 8;
/// A list that is longer is left as it is, in bytes: 8 MiB, some 400,000 runs.
const LIST: u64 = 8 << 20;

/// The pages of one process, by their addresses.
type Pages = BTreeMap<u64, Bytes>;

/// Asks a CRIU that serves memory on this connection for what its container touches first, and puts it into the
/// images. Returns how many bytes that were.
///
/// # Errors
/// [`Error::Relay`] if CRIU has gone, [`Error::Pages`] if it says something else, and [`Error::Write`] if there is
/// no room for the images.
pub async fn bring<S>(criu: &mut S, layout: Layout, images: &Path) -> Result<u64>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Into and out of memory, which does not wait.
    let lists = lists(images)?;
    let mut pages: HashMap<u64, Pages> = HashMap::new();
    for (process, run) in first(&lists) {
        let request = layout.get(process, run);
        criu.write_all(&request).await.map_err(Error::Relay)?;
        let of_process = pages.entry(process).or_default();
        take(criu, layout, run, of_process).await?;
    }
    let mut bytes = 0;
    for list in lists {
        if let Some(pages) = pages.get(&list.process) {
            bytes += pages.values().map(|page| page.len() as u64).sum::<u64>();
            list.with(pages, images)?;
        }
    }
    Ok(bytes)
}

/// Takes CRIU's answer to the question for a run. It may be less than was asked for.
async fn take(
    criu: &mut (impl AsyncRead + Unpin),
    layout: Layout,
    asked: Run,
    pages: &mut Pages,
) -> Result<()> {
    let (_, answered) = answered(criu, layout).await?;
    if answered.pages > asked.pages {
        return Err(Error::Pages("more is answered than was asked for"));
    }
    // No more than a few pages.
    let mut content = vec![0; answered.content() as usize];
    criu.read_exact(&mut content).await.map_err(Error::Relay)?;
    let mut content = Bytes::from(content);
    let mut address = asked.address;
    while !content.is_empty() {
        pages.insert(address, content.split_to(page_size() as usize));
        address = address.wrapping_add(page_size());
    }
    Ok(())
}

/// The list of a process's pages.
#[derive(Debug)]
struct List {
    process: u64,
    /// The file of those that are in the images.
    pages_id: u32,
    runs: Vec<Run>,
}

/// The lists of all processes. What cannot be read as one is left to CRIU.
fn lists(images: &Path) -> Result<Vec<List>> {
    let failed = |source| Error::Read {
        path: images.to_owned(),
        source,
    };
    let mut lists = Vec::new();
    for entry in std::fs::read_dir(images).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let name = entry.file_name();
        let Some(process) = name.to_str().and_then(process_of) else {
            continue;
        };
        if entry.metadata().map_err(failed)?.len() > LIST {
            continue;
        }
        let list = std::fs::read(entry.path()).map_err(failed)?;
        if let Some((pages_id, runs)) = pagemap::read(&list) {
            lists.push(List {
                process,
                pages_id,
                runs,
            });
        }
    }
    Ok(lists)
}

/// The process of which this is the list of pages, by its name (`imgset_template` in `criu/image-desc.c`).
fn process_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    number.parse().ok()
}

/// The shortest runs of pages that are not in the images, and the ends of those for which there is no room.
fn first(lists: &[List]) -> Vec<(u64, Run)> {
    let mut all = Vec::new();
    for list in lists {
        let later = list.runs.iter().copied();
        let later = later.filter(|run| run.is_elsewhere() && run.pages > 0);
        all.extend(joined(later).into_iter().map(|run| (list.process, run)));
    }
    all.sort_by_key(|(_, run)| run.pages);
    let mut room = FIRST;
    let mut first = Vec::new();
    for (process, run) in all {
        let parts = match run.pages <= room {
            true => vec![run],
            false => run.ends(END).into(),
        };
        let pages = parts.iter().map(|run| run.pages).sum();
        let Some(left) = room.checked_sub(pages) else {
            break;
        };
        room = left;
        first.extend(parts.into_iter().map(|run| (process, run)));
    }
    first
}

/// Runs that follow one another, as one: CRIU ends one where a pipe of its own is full.
fn joined(runs: impl Iterator<Item = Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs {
        match joined.last_mut() {
            Some(last) if last.end() == Some(run.address) => {
                last.pages = last.pages.saturating_add(run.pages);
            }
            _ => joined.push(run),
        }
    }
    joined
}

impl Run {
    /// The address behind it.
    fn end(self) -> Option<u64> {
        let length = self.pages.checked_mul(page_size())?;
        self.address.checked_add(length)
    }

    /// So many pages at its beginning and at its end; it has more.
    fn ends(self, pages: u64) -> [Run; 2] {
        let behind = self.pages.saturating_sub(pages).wrapping_mul(page_size());
        let address = self.address.wrapping_add(behind);
        [
            Run { pages, ..self },
            Run {
                address,
                pages,
                ..self
            },
        ]
    }

    /// In parts: those of which the pages are there, with them, and those that are still elsewhere.
    fn split(self, pages: &Pages) -> Vec<(Run, Vec<Bytes>)> {
        let part = |address: u64, pages: u64, flags: u32| Run {
            address,
            pages,
            flags,
        };
        let end = self.end().unwrap_or(u64::MAX);
        let mut parts: Vec<(Run, Vec<Bytes>)> = Vec::new();
        let mut at = self.address;
        for (address, page) in pages.range(self.address..end) {
            if at < *address {
                let between = (address - at) / page_size();
                parts.push((part(at, between, self.flags), Vec::new()));
            }
            match parts.last_mut() {
                Some((last, content)) if !content.is_empty() && last.end() == Some(*address) => {
                    last.pages += 1;
                    content.push(page.clone());
                }
                _ => parts.push((part(*address, 1, Run::PRESENT), vec![page.clone()])),
            }
            at = address.saturating_add(page_size());
        }
        if at < end {
            parts.push((part(at, (end - at) / page_size(), self.flags), Vec::new()));
        }
        parts
    }
}

impl List {
    /// Writes it and its pages anew, with these among them.
    fn with(&self, pages: &Pages, images: &Path) -> Result<()> {
        let list = images.join(Memory::Process(self.process).list());
        let content = images.join(format!("pages-{}.img", self.pages_id));
        let written = self.write(pages, &content);
        let (new_list, new_content) = written.map_err(failed(&content))?;
        std::fs::rename(&new_content, &content).map_err(failed(&content))?;
        std::fs::write(&list, new_list).map_err(failed(&list))
    }

    fn write(&self, pages: &Pages, content: &Path) -> io::Result<(Vec<u8>, PathBuf)> {
        let mut before = File::open(content)?;
        let new = content.with_extension("new");
        let mut after = BufWriter::new(File::create_new(&new)?);
        let mut list = Vec::new();
        pagemap::begin(&mut list, self.pages_id)?;
        for run in &self.runs {
            if !run.is_elsewhere() {
                let length = run.content();
                if io::copy(&mut Read::by_ref(&mut before).take(length), &mut after)? < length {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                pagemap::add(&mut list, *run)?;
                continue;
            }
            for (part, content) in run.split(pages) {
                for page in content {
                    after.write_all(&page)?;
                }
                pagemap::add(&mut list, part)?;
            }
        }
        after.flush()?;
        Ok((list, new))
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Write {
        value: "pages that are needed first",
        path,
        source,
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::duplex;

    use super::super::tests::{page, server};
    use super::*;

    const LAZY: u32 = Run::LAZY;

    fn run(address: u64, pages: u64, flags: u32) -> Run {
        Run {
            address,
            pages,
            flags,
        }
    }

    /// Images with one list, and the pages that are present.
    fn images(runs: &[Run]) -> tempfile::TempDir {
        let images = tempfile::tempdir().unwrap();
        let mut list = Vec::new();
        pagemap::begin(&mut list, 5).unwrap();
        let mut content = Vec::new();
        for run in runs {
            pagemap::add(&mut list, *run).unwrap();
            for place in 0..run.content() / page_size() {
                content.extend(page(run.address + place * page_size()));
            }
        }
        std::fs::write(images.path().join("pagemap-3.img"), list).unwrap();
        std::fs::write(images.path().join("pages-5.img"), content).unwrap();
        images
    }

    #[tokio::test]
    async fn what_is_needed_first_is_in_the_images_and_the_rest_is_not() {
        let p = page_size();
        let runs = [
            run(0x10 * p, 2, Run::PRESENT),
            run(0x20 * p, 3, LAZY),
            // One that is long, in two parts.
            run(0x1000 * p, 1024, LAZY),
            run(0x1400 * p, 1024, LAZY),
            run(0x2000 * p, 1, Run::IN_PARENT),
            run(0x3000 * p, 1, Run::PRESENT),
            run(0x4000 * p, 1, LAZY),
        ];
        for layout in [Layout::Narrow, Layout::Wide] {
            let images = images(&runs);
            let (mut ours, theirs) = duplex(1 << 20);
            let brought = async {
                let bytes = bring(&mut ours, layout, images.path()).await.unwrap();
                drop(ours);
                bytes
            };
            let (asked, bytes) = futures::join!(server(theirs, layout), brought);
            let ends = [(3, 0x1000 * p, END), (3, 0x1800 * p - END * p, END)];
            assert_eq!(
                asked,
                [vec![(3, 0x4000 * p, 1), (3, 0x20 * p, 3)], ends.to_vec()].concat()
            );
            assert_eq!(bytes, (1 + 3 + 2 * END) * p);

            let list = std::fs::read(images.path().join("pagemap-3.img")).unwrap();
            let (number, listed) = pagemap::read(&list).unwrap();
            assert_eq!(number, 5);
            let expected = [
                runs[0],
                run(0x20 * p, 3, Run::PRESENT),
                run(0x1000 * p, END, Run::PRESENT),
                run(0x1000 * p + END * p, 1024 - END, LAZY),
                run(0x1400 * p, 1024 - END, LAZY),
                run(0x1800 * p - END * p, END, Run::PRESENT),
                runs[4],
                runs[5],
                run(0x4000 * p, 1, Run::PRESENT),
            ];
            assert_eq!(listed, expected);
            let content = std::fs::read(images.path().join("pages-5.img")).unwrap();
            let present = expected.iter().filter(|run| run.content() > 0);
            let pages = present.flat_map(|run| (0..run.pages).map(|place| run.address + place * p));
            let right: Vec<u8> = pages.flat_map(page).collect();
            assert!(content == right);
            assert_eq!(std::fs::read_dir(images.path()).unwrap().count(), 2);
        }
    }

    #[tokio::test]
    async fn no_more_goes_ahead_than_there_is_room_for() {
        let p = page_size();
        let short = |place: u64| run(place * 0x1000 * p, 100, LAZY);
        let lists = [List {
            process: 3,
            pages_id: 5,
            runs: (1..9).map(short).collect(),
        }];
        let pages: u64 = first(&lists).iter().map(|(_, run)| run.pages).sum();
        assert!(pages <= FIRST && pages > FIRST - 2 * END, "{pages}");
    }

    #[tokio::test]
    async fn something_else_than_pages_is_not_taken_for_an_answer() {
        let layout = Layout::Wide;
        let more = run(0, 3, Run::PRESENT);
        for answer in [layout.get(3, run(0, 1, 0)), layout.add(3, more)] {
            let mut pages = Pages::new();
            let taken = take(&mut &answer[..], layout, run(0, 2, LAZY), &mut pages).await;
            assert!(matches!(taken, Err(Error::Pages(_))), "{taken:?}");
        }
    }
}
