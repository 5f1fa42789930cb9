//! A container's memory on its way to the CRIU that gives it to the container, at the destination, with
//! post-copy.
//!
//! # Ahead
//! Each page that the container waits for crosses the network by itself, twice: as a request and as an answer.
//! What it touches first are its stacks and the data of its libraries, which are short runs of pages; what it
//! works on is long, but at its ends may be others that the kernel has put beside it. So the shortest runs and the
//! ends of long ones are fetched while its processes are still being made, and are here when they are asked for.
//!
//! # Pace
//! CRIU asks for the page that the container waits for, and as long as it waits for none, for the rest in
//! ever larger runs. What it is served it takes in the order of its requests, so that whoever waits for a page
//! waits for the run before it too. At the beginning that is most of the time that passes until the container
//! answers: so until it has been let go and has found what it needs, runs go on slowly, which keeps them short,
//! too. They are given whole: who waits for a page of a run that is on its way is forgotten if the page is not in
//! it (`is_page_queued` and `uffd_io_complete` in `criu/uffd.c`).

use std::collections::HashMap;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, copy_buf};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::wanted::{Asking, Request};
use super::{ADD, Fields, Layout, MOST_PAGES, Run, page_size, pagemap};
use crate::criu::{Error, Result};

/// So many pages are fetched ahead at most: 4 MiB, which cross while CRIU makes a process.
const AHEAD: u64 = 1024;
/// As much of a long run is an end: 8 pages.
const END: u64 = 8;
/// Of all lists together, no more than this is read to find them, in bytes: 8 MiB, some 400,000 runs.
const LISTS: u64 = 8 << 20;
/// How long a run waits, unless something comes after it. (It is a few dozen pages long at the beginning, see
/// `update_xfer_len` in `criu/uffd.c`.)
const PAUSE: Duration = Duration::from_millis(2);
/// How long no page is asked for when the container has found what it needs at first.
const QUIET: Duration = Duration::from_millis(10);
/// A container that goes on asking gets the rest of its memory at full speed after this all the same.
const LONGEST: Duration = Duration::from_millis(250);

/// The container's first moments: from when it was let go until it had found what it needs at first.
#[derive(Debug, Clone, Default)]
pub struct FirstMoments(Arc<Moments>);

#[derive(Debug, Default)]
struct Moments {
    began: OnceLock<Instant>,
    /// How long after that the last of these pages was asked for, in nanoseconds.
    last: AtomicU64,
}

impl FirstMoments {
    /// The container is let go now.
    pub fn begin(&self) {
        // Only the first time counts.
        let _ = self.0.began.set(Instant::now());
    }

    /// How long they were; none if the container went on asking, so that nobody can tell from outside what
    /// was for its answers and what for other work.
    pub fn took(&self) -> Option<Duration> {
        let took = self.so_far();
        (took + QUIET <= LONGEST).then_some(took)
    }

    fn so_far(&self) -> Duration {
        Duration::from_nanos(self.0.last.load(Ordering::Relaxed))
    }

    /// Whether they are not over.
    fn go_on(&self) -> bool {
        let began = self.0.began.get();
        began.is_none_or(|began| began.elapsed() < LONGEST.min(self.so_far() + QUIET))
    }

    /// The container waits for a page.
    fn asked(&self) {
        if let (Some(began), true) = (self.0.began.get(), self.go_on()) {
            // Less than a second.
            let since = began.elapsed().as_nanos() as u64;
            self.0.last.store(since, Ordering::Relaxed);
        }
    }
}

/// What is to be fetched ahead: runs of pages of processes, which have their numbers in their own namespace.
#[derive(Debug, Default)]
pub struct Ahead(Vec<(u64, Run)>);

impl Ahead {
    /// The shortest runs of pages that are still at the source, by the lists among these images. What cannot be
    /// read is left to whoever needs it.
    pub fn of(images: &Path) -> Ahead {
        let mut whole = Vec::new();
        let mut left = LISTS;
        let entries = std::fs::read_dir(images).into_iter().flatten().flatten();
        for entry in entries {
            let name = entry.file_name();
            let Some(process) = name.to_str().and_then(process_of) else {
                continue;
            };
            let mut list = Vec::new();
            let Ok(file) = std::fs::File::open(entry.path()) else {
                continue;
            };
            let read = file.take(left).read_to_end(&mut list);
            left = left.saturating_sub(read.unwrap_or_default() as u64);
            let runs = pagemap::runs(&list).filter(|run| run.is_elsewhere() && run.pages > 0);
            whole.extend(joined(runs).into_iter().map(|run| (process, run)));
        }
        whole.sort_by_key(|(_, run)| run.pages);
        let mut room = AHEAD;
        let mut ahead = Vec::new();
        for (process, run) in whole {
            let parts = match run.pages <= room {
                true => vec![run],
                false => run.ends(END).into(),
            };
            let pages = parts.iter().map(|run| run.pages).sum();
            let Some(left) = room.checked_sub(pages) else {
                break;
            };
            room = left;
            ahead.extend(parts.into_iter().map(|run| (process, run)));
        }
        Ahead(ahead)
    }
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
        self.address
            .checked_add(self.pages.checked_mul(page_size())?)
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
}

/// The process of which this is the list of pages, by its name (`imgset_template` in `criu/image-desc.c`).
fn process_of(name: &str) -> Option<u64> {
    let number = name.strip_prefix("pagemap-")?.strip_suffix(".img")?;
    number.parse().ok()
}

/// Gives a CRIU the pages that it asks for, from a source: what is written to `asks` is what it is asked for, and
/// what is read from `pages` are its answers.
///
/// # Errors
/// [`Error::Relay`] if a connection breaks, and [`Error::Pages`] if something else than pages is asked for, or
/// comes.
pub async fn fetch(
    criu: (impl AsyncRead + Unpin, impl AsyncWrite + Unpin),
    mut asks: impl AsyncWrite + Unpin,
    mut pages: impl AsyncBufRead + Unpin,
    layout: Layout,
    ahead: Ahead,
    moments: &FirstMoments,
) -> Result<()> {
    let requests: Vec<u8> = ahead
        .0
        .iter()
        .flat_map(|(process, run)| layout.get(*process, *run))
        .collect();
    // No more than a pipe holds, so that whoever answers does not wait for it to be read.
    asks.write_all(&requests).await.map_err(Error::Relay)?;
    let mut here = Here::default();
    for (process, run) in &ahead.0 {
        here.take(&mut pages, layout, *process, *run).await?;
    }
    let (owes, owed) = unbounded_channel();
    let asking = Asking::new(criu.0, layout);
    let ask = pass_on(asking, asks, &here, owes, layout, moments);
    let answer = answer(pages, criu.1, owed, layout);
    futures::try_join!(ask, answer)?;
    Ok(())
}

/// What a CRIU is to be given next.
enum Owed {
    /// These pieces.
    Pieces(Vec<Bytes>),
    /// What the source answers next.
    Next,
    /// All that it still says.
    Rest,
}

/// Passes on what a CRIU asks for, if it is not here.
async fn pass_on(
    mut asking: Asking<impl AsyncRead + Unpin>,
    mut asks: impl AsyncWrite + Unpin,
    here: &Here,
    owes: UnboundedSender<Owed>,
    layout: Layout,
    moments: &FirstMoments,
) -> Result<()> {
    while let Some((bytes, request)) = asking.next().await? {
        let owed = match request {
            Request::Pages {
                process,
                address,
                pages,
            } => {
                if pages == 1 {
                    moments.asked();
                }
                match here.find(layout, process, address, pages) {
                    Some(pieces) => Owed::Pieces(pieces),
                    None => {
                        if pages > 1 && moments.go_on() {
                            let behind = tokio::time::timeout(PAUSE, asking.has_one()).await;
                            behind.unwrap_or(Ok(false))?;
                        }
                        Owed::Next
                    }
                }
            }
            Request::End => Owed::Rest,
        };
        if !matches!(owed, Owed::Pieces(_)) {
            asks.write_all(&bytes).await.map_err(Error::Relay)?;
        }
        if owes.send(owed).is_err() {
            break;
        }
    }
    Ok(())
}

/// Gives a CRIU what it is owed, in the order in which it has asked.
async fn answer(
    mut pages: impl AsyncBufRead + Unpin,
    mut criu: impl AsyncWrite + Unpin,
    mut owed: UnboundedReceiver<Owed>,
    layout: Layout,
) -> Result<()> {
    while let Some(owed) = owed.recv().await {
        match owed {
            Owed::Pieces(pieces) => {
                for piece in pieces {
                    criu.write_all(&piece).await.map_err(Error::Relay)?;
                }
            }
            Owed::Next => {
                let (head, run) = answered(&mut pages, layout).await?;
                criu.write_all(&head).await.map_err(Error::Relay)?;
                let mut content = (&mut pages).take(run.content());
                let copied = copy_buf(&mut content, &mut criu)
                    .await
                    .map_err(Error::Relay)?;
                if copied < run.content() {
                    return Err(CUT_OFF);
                }
            }
            Owed::Rest => {
                copy(&mut pages, &mut criu).await.map_err(Error::Relay)?;
            }
        }
    }
    Ok(())
}

const CUT_OFF: Error = Error::Pages("an answer is cut off");

/// The head of an answer, and which pages follow it.
async fn answered(pages: &mut (impl AsyncRead + Unpin), layout: Layout) -> Result<(Vec<u8>, Run)> {
    let mut head = vec![0; layout.length()];
    pages.read_exact(&mut head).await.map_err(Error::Relay)?;
    match Fields::read(&head, layout) {
        Some(fields) if fields.word == ADD && fields.pages <= MOST_PAGES => {
            let run = Run {
                address: fields.address,
                pages: fields.pages,
                flags: fields.flags.into(),
            };
            Ok((head, run))
        }
        _ => Err(Error::Pages("something else than pages is answered")),
    }
}

/// Pages that are here: of which process, at which address.
#[derive(Debug, Default)]
struct Here(HashMap<(u64, u64), Bytes>);

impl Here {
    /// Takes the answer to the question for this run.
    async fn take(
        &mut self,
        pages: &mut (impl AsyncRead + Unpin),
        layout: Layout,
        process: u64,
        asked: Run,
    ) -> Result<()> {
        let (_, run) = answered(pages, layout).await?;
        if run.pages > asked.pages {
            return Err(Error::Pages("more is answered than was asked for"));
        }
        // No more than was asked for.
        let mut content = vec![0; run.content() as usize];
        pages.read_exact(&mut content).await.map_err(Error::Relay)?;
        let mut content = Bytes::from(content);
        let mut address = asked.address;
        while !content.is_empty() {
            let page = content.split_to(page_size() as usize);
            self.0.insert((process, address), page);
            address = address.wrapping_add(page_size());
        }
        Ok(())
    }

    /// The answer to a question for pages, if all of them are here.
    fn find(&self, layout: Layout, process: u64, address: u64, pages: u64) -> Option<Vec<Bytes>> {
        let run = Run {
            address,
            pages,
            flags: Run::PRESENT,
        };
        let head = Bytes::from(layout.add(process, run));
        let wanted = (0..pages).map(|place| {
            let at = address.checked_add(place.checked_mul(page_size())?)?;
            self.0.get(&(process, at)).cloned()
        });
        std::iter::once(Some(head)).chain(wanted).collect()
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{BufReader, DuplexStream, duplex, split};

    use super::*;

    const PROCESS: u64 = 3;
    const BOTH: [Layout; 2] = [Layout::Narrow, Layout::Wide];

    fn run(address: u64, pages: u64) -> Run {
        Run {
            address,
            pages,
            flags: 0,
        }
    }

    /// What the page at this address is filled with.
    fn filling(address: u64) -> u8 {
        (address / page_size()) as u8
    }

    /// A source that answers until nobody asks any more. Returns the runs that it was asked for.
    async fn source(ours: DuplexStream, layout: Layout) -> Vec<(u64, u64)> {
        let (asks, mut answers) = split(ours);
        let mut asking = Asking::new(asks, layout);
        let mut asked = Vec::new();
        while let Ok(Some((_, request))) = asking.next().await {
            let Request::Pages {
                process,
                address,
                pages,
            } = request
            else {
                answers.write_all(&[0; 4]).await.unwrap();
                break;
            };
            asked.push((address, pages));
            let present = Run {
                flags: Run::PRESENT,
                ..run(address, pages)
            };
            answers
                .write_all(&layout.add(process, present))
                .await
                .unwrap();
            for place in 0..pages {
                let page = vec![filling(address + place * page_size()); page_size() as usize];
                answers.write_all(&page).await.unwrap();
            }
        }
        asked
    }

    /// A CRIU that asks for these runs at once and then says that that was all. Returns how many pages it was
    /// given of each.
    async fn criu(mut ours: DuplexStream, layout: Layout, wanted: &[(u64, u64)]) -> Vec<u64> {
        let mut requests = Vec::new();
        for (address, pages) in wanted {
            requests.extend(layout.get(PROCESS, run(*address, *pages)));
        }
        ours.write_all(&requests).await.unwrap();
        let mut given = Vec::new();
        for (address, _) in wanted {
            let (_, got) = answered(&mut ours, layout).await.unwrap();
            assert_eq!(got.address, *address);
            for place in 0..got.pages {
                let mut page = vec![0; page_size() as usize];
                ours.read_exact(&mut page).await.unwrap();
                let right = filling(address + place * page_size());
                assert!(page.iter().all(|byte| *byte == right));
            }
            given.push(got.pages);
        }
        let end = [0x23, 0x10].into_iter().chain([0; 30]);
        let end: Vec<u8> = end.take(layout.length()).collect();
        ours.write_all(&end).await.unwrap();
        ours.read_exact(&mut [0; 4]).await.unwrap();
        given
    }

    /// What a CRIU is given of these runs, and what the source is asked for.
    async fn fetched(
        layout: Layout,
        ahead: &[(u64, u64)],
        wanted: &[(u64, u64)],
        moments: &FirstMoments,
    ) -> (Vec<u64>, Vec<(u64, u64)>) {
        let (asks, here) = duplex(1 << 20);
        let (there, serves) = duplex(1 << 20);
        let (reads, writes) = split(here);
        let (pages, requests) = split(there);
        let lazy = |&(address, pages): &(u64, u64)| Run {
            flags: Run::LAZY,
            ..run(address, pages)
        };
        let ahead = Ahead(ahead.iter().map(|run| (PROCESS, lazy(run))).collect());
        let pages = BufReader::new(pages);
        let fetching = fetch((reads, writes), requests, pages, layout, ahead, moments);
        let (asked, given, fetched) =
            futures::join!(source(serves, layout), criu(asks, layout, wanted), fetching);
        fetched.unwrap();
        (given, asked)
    }

    #[tokio::test]
    async fn what_is_ahead_is_not_asked_for_again() {
        let page = page_size();
        for layout in BOTH {
            let ahead = [(0, 2), (16 * page, 1)];
            let wanted = [(page, 1), (0, 9), (32 * page, 1), (16 * page, 1), (0, 2)];
            let (given, asked) = fetched(layout, &ahead, &wanted, &FirstMoments::default()).await;
            // In the order in which it was asked for, and whole.
            assert_eq!(given, [1, 9, 1, 1, 2]);
            assert_eq!(asked, [(0, 2), (16 * page, 1), (0, 9), (32 * page, 1)]);
        }
    }

    #[tokio::test]
    async fn runs_go_on_slowly_until_the_container_has_found_its_way() {
        let page = page_size();
        let layout = Layout::Wide;
        // Behind these runs nobody waits: the answer to a page says that nothing more is asked for.
        let mut waited = Duration::ZERO;
        for _ in 0..3 {
            let began = Instant::now();
            let (criu, ours) = duplex(1 << 20);
            let (there, serves) = duplex(1 << 20);
            let (pages, asks) = split(there);
            let moments = FirstMoments::default();
            let ahead = Ahead::default();
            let pages = BufReader::new(pages);
            let fetching = fetch(split(ours), asks, pages, layout, ahead, &moments);
            let asks_once = async {
                let mut criu = criu;
                let request = layout.get(PROCESS, run(page, 90));
                criu.write_all(&request).await.unwrap();
                answered(&mut criu, layout).await.unwrap().1.pages
            };
            let given = tokio::select! {
                given = asks_once => given,
                _ = fetching => panic!("it ends"),
                _ = source(serves, layout) => panic!("the source ends"),
            };
            assert_eq!(given, 90);
            waited += began.elapsed();
        }
        assert!(waited >= 3 * PAUSE, "{waited:?}");
    }

    #[tokio::test]
    async fn its_first_moments_are_as_long_as_it_asks_for_pages() {
        let moments = FirstMoments::default();
        moments.begin();
        fetched(Layout::Wide, &[], &[(0, 1)], &moments).await;
        let took = moments.took();
        assert!(took > Some(Duration::ZERO) && took < Some(QUIET));
        std::thread::sleep(2 * QUIET);
        fetched(Layout::Wide, &[], &[(0, 1)], &moments).await;
        assert_eq!(moments.took(), took);
    }

    #[tokio::test]
    async fn something_else_than_pages_is_not_taken_for_an_answer() {
        let layout = Layout::Wide;
        let more = Run {
            flags: Run::PRESENT,
            ..run(0, 3)
        };
        let cases = [
            ("no answer", layout.get(PROCESS, run(0, 1))),
            ("more than was asked for", layout.add(PROCESS, more)),
            ("a part of one", layout.add(PROCESS, more)[..9].to_vec()),
        ];
        for (what, answer) in cases {
            let (criu, _stays) = duplex(1 << 10);
            let ahead = Ahead(vec![(PROCESS, run(0, 2))]);
            let (moments, asks) = (FirstMoments::default(), tokio::io::sink());
            let fetched = fetch(split(criu), asks, &answer[..], layout, ahead, &moments);
            let refused = fetched.await;
            assert!(refused.is_err(), "{what}");
        }
    }

    #[test]
    fn the_shortest_runs_that_are_elsewhere_go_ahead() {
        let images = tempfile::tempdir().unwrap();
        let list = |name: &str, runs: &[(u64, u64, u32)]| {
            let mut list = Vec::new();
            pagemap::begin(&mut list, 1).unwrap();
            for (address, pages, flags) in runs {
                let flags = *flags;
                let run = Run {
                    flags,
                    ..run(*address, *pages)
                };
                pagemap::add(&mut list, run).unwrap();
            }
            std::fs::write(images.path().join(name), list).unwrap();
        };
        let lazy = Run::LAZY;
        list(
            "pagemap-1.img",
            &[
                (0, 3, lazy),
                (1 << 20, 1, lazy | Run::PRESENT),
                (2 << 20, 900, lazy),
                (1 << 30, 1 << 20, lazy),
                ((1 << 30) + (1 << 32), 2 << 20, lazy),
                (1 << 40, 1, lazy | Run::IN_PARENT),
                (1 << 41, 0, lazy),
            ],
        );
        list("pagemap-7.img", &[(5 << 20, 2, lazy), (6 << 20, 150, lazy)]);
        list("pagemap-shmem-9.img", &[(0, 1, lazy)]);
        std::fs::write(images.path().join("pagemap-8.img"), "no list").unwrap();
        let Ahead(ahead) = Ahead::of(images.path());
        let ahead: Vec<_> = ahead
            .iter()
            .map(|(process, run)| (*process, run.address, run.pages))
            .collect();
        let page = page_size();
        let long =
            |address: u64, pages: u64| [(address, END), (address + (pages - END) * page, END)];
        let mut expected = vec![(5 << 20, 2), (0, 3), (6 << 20, 150)];
        // 900 more would be too many.
        expected.extend(long(2 << 20, 900));
        // It is in two parts.
        expected.extend(long(1 << 30, 3 << 20));
        let ahead: Vec<_> = ahead
            .into_iter()
            .map(|(_, address, pages)| (address, pages))
            .collect();
        assert_eq!(ahead, expected);
    }
}
