//! A container's memory on its way, with the direct engine.
//!
//! It goes from CRIU straight to the destination, over a connection of its own: while the container runs
//! ([`round`]), when it is frozen ([`send`]), or when it runs over there already ([`leave`]).

use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use futures::{StreamExt, TryStreamExt};
use hyper::{HeaderMap, Method};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio_util::io::{ReaderStream, StreamReader};
use tokio_util::sync::CancellationToken;

use super::event::{Event, Observer};
use super::preflight::Preflight;
use super::request::Request;
use super::shell::Shell;
use crate::agent::protocol::{MigrationId, Nothing};
use crate::bundle::{self, Progress};
use crate::criu::pages::Layout;
use crate::criu::pages::relay::{self, Lists};
use crate::criu::pages::{first, wanted};
use crate::criu::{DumpStats, Freezer};
use crate::podman::{ContainerId, FailureLog, failure_log};
use crate::runtime::{Checkpoint, CriuOption, Standby, Thaw, Verb};
use crate::{Config, Error, Result, runtime};

/// Pages that were asked for are sent in pieces of at most this many bytes: 256 KiB.
const PIECE: usize = 256 << 10;

/// A round in which memory was copied while the container ran.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Round {
    /// How many bytes went.
    pub bytes: u64,
    /// How long it took.
    #[serde(rename = "ms", serialize_with = "super::report::milliseconds")]
    pub took: Duration,
    /// How long the container's processes stood still for it; none if CRIU did not say.
    #[serde(
        rename = "frozen_ms",
        serialize_with = "super::report::milliseconds_if_known"
    )]
    pub frozen: Option<Duration>,
}

/// What has to be known to move memory.
pub(super) struct Terms<'a> {
    request: &'a Request,
    migration: &'a MigrationId,
    layout: Layout,
    /// How many rounds the destination has.
    rounds: usize,
}

impl<'a> Terms<'a> {
    pub fn of(
        preflight: &Preflight,
        request: &'a Request,
        migration: &'a MigrationId,
        rounds: usize,
    ) -> Result<Terms<'a>> {
        let criu = preflight.offer.features.criu.as_ref();
        Ok(Terms {
            request,
            migration,
            layout: Layout::of(criu.ok_or(Error::OutOfOrder("CRIU"))?.version),
            rounds,
        })
    }

    fn config(&self) -> &Config {
        &self.request.config
    }
}

/// Copies the memory while the container runs: all of it, or what has changed since the round before. The
/// container stands still for as long as CRIU takes to find out what that is.
pub(super) async fn round(
    shell: &mut Shell,
    terms: &Terms<'_>,
    observer: &mut dyn Observer,
) -> Result<Round> {
    let began = Instant::now();
    let number = terms.rounds + 1;
    let (images, work) = shell.round(number)?;
    let options = [CriuOption::PageServer];
    let standby = Standby::open(terms.config(), &work, Verb::Checkpoint, &options)?;
    let mut call = shell
        .checkpoint
        .clone()
        .with_image_path(&images)
        .with_work_path(&work)
        .with_flag("--pre-dump");
    if terms.rounds > 0 {
        call = call.with_option("--parent-path", &parent(terms.rounds));
    }
    let runtime = Checkpoint::start(&shell.runtime, &call, standby.environment())?;
    let (runtime, criu) = standby
        .ready_for(runtime, terms.config().shell_timeout)
        .await
        .map_err(|error| of_criu(error.into(), &work))?;
    let path = format!("/v1/migrations/{}/rounds/{number}", terms.migration);
    let lists = Lists {
        before: shell.last_round(terms.rounds),
        leave: Some(images),
    };
    observer.observe(Event::StandsStill);
    let container = &shell.checkpoint.container;
    let still = match &shell.freezer {
        Some(freezer) => {
            Some(Still::begin(terms.config(), container, freezer, criu.process()?).await?)
        }
        None => None,
    };
    let thaw = still.as_ref().map(Still::goes_on);
    let going = CancellationToken::new();
    let own_memory = {
        let going = going.clone();
        move || {
            if let Some(thaw) = &thaw {
                thaw();
            }
            going.cancel();
        }
    };
    let sent = async {
        // Also where CRIU came to none of it.
        let _going = going.clone().drop_guard();
        let criu = criu.go().await?;
        pages(
            shell,
            terms,
            (runtime, criu),
            lists,
            own_memory,
            &path,
            &work,
        )
        .await
    };
    let goes_on = async {
        going.cancelled().await;
        observer.observe(Event::GoesOn);
    };
    let (sent, ()) = futures::join!(sent, goes_on);
    let stood = match still {
        Some(still) => still.ended().await?,
        None => None,
    };
    Ok(Round {
        bytes: sent?,
        took: began.elapsed(),
        frozen: stood.or_else(|| standstill(&work)),
    })
}

/// A container that stands still for the beginning of a round.
///
/// CRIU would freeze its cgroup by itself, but looks in steps of 100 ms whether all have stopped, for which
/// any process that does something is too slow. What it finds frozen it leaves frozen, in the moment in which
/// it lets go of the processes: from then on they can be thawed, and that is what all the rest is for.
struct Still {
    freezer: Freezer,
    since: Instant,
    /// For how long they did, once they go on.
    stood: Arc<OnceLock<Duration>>,
    thaw: Thaw,
}

impl Still {
    async fn begin(
        config: &Config,
        container: &ContainerId,
        freezer: &Freezer,
        criu: u32,
    ) -> Result<Still> {
        // If anything fails from here on, CRIU included, this is what thaws.
        let thaw = Thaw::start(config, container, freezer, criu)?;
        let since = Instant::now();
        freezer.freeze(config.freeze_timeout).await?;
        Ok(Still {
            freezer: freezer.clone(),
            since,
            stood: Arc::default(),
            thaw,
        })
    }

    /// Lets the processes go on, the first time that it is called.
    fn goes_on(&self) -> impl Fn() + Send + use<> {
        let (freezer, since) = (self.freezer.clone(), self.since);
        let stood = self.stood.clone();
        move || {
            stood.get_or_init(|| {
                if let Err(error) = freezer.thaw() {
                    tracing::warn!(%error, "the container goes on only at the end of the round");
                }
                since.elapsed()
            });
        }
    }

    /// Waits until nobody will thaw any more, since the next one that freezes may want it to last.
    async fn ended(self) -> Result<Option<Duration>> {
        self.thaw.done().await?;
        Ok(self.stood.get().copied())
    }
}

/// How long the container stood still in a round in which CRIU stopped it, by its own account.
fn standstill(work: &Path) -> Option<Duration> {
    DumpStats::of(work).map(|statistics| statistics.freezing + statistics.frozen)
}

/// Where an earlier round is, seen from a later one or from the last images (`--parent-path` in criu(8)).
pub(crate) fn parent(round: usize) -> String {
    format!("../round-{round}")
}

/// Has CRIU take the frozen container's state: its memory goes to the destination, the rest into a
/// directory. The container stays frozen, and complete. Returns how many bytes have gone.
pub(super) async fn send(shell: &mut Shell, terms: &Terms<'_>) -> Result<u64> {
    let standby = shell.standby.take();
    let (runtime, criu) = standby.ok_or(Error::OutOfOrder("runtime on standby"))?;
    let path = format!("/v1/migrations/{}/pages", terms.migration);
    let work = shell.work.clone();
    let lists = Lists {
        before: shell.last_round(terms.rounds),
        leave: None,
    };
    let criu = criu.go().await?;
    pages(shell, terms, (runtime, criu), lists, || (), &path, &work).await
}

/// Passes on what a CRIU sends to its page server.
async fn pages(
    shell: &mut Shell,
    terms: &Terms<'_>,
    (runtime, criu): (Checkpoint, UnixStream),
    lists: Lists,
    own_memory: impl FnMut() + Send + 'static,
    path: &str,
    work: &Path,
) -> Result<u64> {
    // Where there was no dump nobody ends the stream, and the destination takes it for cut off. Whoever
    // wants the migration to end cuts it off.
    let failed: CancellationToken = terms.request.cancel.child_token();
    let pages = relay::pages(criu, terms.layout, lists, own_memory)
        .take_until(failed.clone().cancelled_owned());
    let (bytes, progress) = bundle::send(pages);
    let within = terms.config().shell_timeout;
    let send = shell
        .for_pages
        .send_stream(Method::PUT, path, HeaderMap::new(), bytes, within);
    // Whichever fails first makes the other fail as well, and is the reason.
    let send = async { (send.await, failed.is_cancelled()) };
    let dump = async { runtime.ended().await.inspect_err(|_| failed.cancel()) };
    let (dumped, (sent, failed_before)) = futures::join!(dump, send);
    if terms.request.cancel.is_cancelled() {
        return Err(Error::Interrupted(super::Phase::Freeze));
    }
    match sent {
        Err(error) if !failed_before => Err(Error::of_host(&terms.request.to)(error)),
        sent => {
            dumped.map_err(|error| of_criu(error.into(), work))?;
            let Nothing {} = sent?;
            Ok(progress.wire())
        }
    }
}

/// A CRIU that has taken the container's state, and serves its memory until the destination has it.
#[derive(Debug)]
pub(super) struct Serving {
    runtime: Checkpoint,
    /// Passes on what the destination wants.
    passed_on: tokio::task::JoinHandle<()>,
    progress: Progress,
}

impl Serving {
    /// Waits until the destination has all of it. Returns how many bytes that were.
    pub async fn ended(self) -> Result<u64> {
        let served = self.runtime.ended().await;
        self.passed_on.abort();
        served?;
        Ok(self.progress.wire())
    }
}

/// Has CRIU take the frozen container's state, but leave all of its memory that it does not need at first, for
/// which the destination will ask.
pub(super) async fn leave(shell: &mut Shell, terms: &Terms<'_>) -> Result<()> {
    let within = terms.config().shell_timeout;
    let standby = shell.standby.take();
    let (mut runtime, criu) = standby.ok_or(Error::OutOfOrder("runtime on standby"))?;
    let mut criu = criu.go().await?;
    // It answers when all but the memory is dumped.
    let answers = relay::answers(&mut criu, terms.layout);
    tokio::select! {
        answers = tokio::time::timeout(within, answers) => answers.map_err(|_| {
            runtime::Error::NotCalled { verb: Verb::Checkpoint, within }
        })??,
        ended = runtime.exited() => {
            ended?;
            let error = runtime.ended().await.err().map(Error::from);
            let error = error.unwrap_or(Error::OutOfOrder("CRIU's answer"));
            return Err(of_criu(error, &shell.work));
        }
    }
    let bytes = first::bring(&mut criu, terms.layout, &shell.images).await?;
    tracing::debug!(bytes, "what is needed first goes with the images");
    let (pages, mut criu) = criu.into_split();
    let progress = Progress::default();
    let counted = progress.clone();
    let pages = ReaderStream::with_capacity(pages, PIECE)
        .inspect_ok(move |piece| counted.add_wire(piece.len()));
    let path = format!("/v1/migrations/{}/lazy", terms.migration);
    let asked = shell
        .for_pages
        .exchange(Method::POST, &path, pages)
        .await
        .map_err(Error::of_host(&terms.request.to))?;
    let asked = StreamReader::new(asked.map_err(std::io::Error::other));
    let requests = wanted::requests(asked, terms.layout);
    let passed_on = tokio::spawn(async move {
        let mut requests = std::pin::pin!(requests);
        loop {
            let passed = match requests.try_next().await {
                Ok(Some(request)) => criu.write_all(&request).await.map_err(|e| e.to_string()),
                Ok(None) => return,
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = passed {
                return tracing::warn!(error, "the destination can ask for no more memory");
            }
        }
    });
    shell.serving = Some(Serving {
        runtime,
        passed_on,
        progress,
    });
    Ok(())
}

/// An error with what CRIU says in its log in this directory, if it says something.
pub(super) fn of_criu(error: Error, directory: &Path) -> Error {
    match failure_log(directory, FailureLog::Dump) {
        Some(reason) => Error::Dump {
            source: Box::new(error),
            reason,
        },
        None => error,
    }
}

/// The directories of one round.
pub(crate) fn directories(staging: &Path, round: usize) -> (PathBuf, PathBuf) {
    (
        staging.join(format!("round-{round}")),
        staging.join(format!("work-{round}")),
    )
}
