//! The one round trip of the downtime: the container goes out, "running" comes back.

use std::time::{Duration, Instant};

use hyper::{HeaderMap, Method};

use super::{Cargo, Event, Migration, Part, connect};
use crate::agent::Peer;
use crate::agent::protocol::{MigrationId, Nothing, Running, Stage, Status};
use crate::bundle::Progress;
use crate::bundle::splice::STATS_DUMP;
use crate::criu::DumpStats;
use crate::{Config, Error, Result};

/// How often the observer is told how much has been sent.
const TOLD_EVERY: Duration = Duration::from_millis(250);

/// How often the destination is asked anew while its answer is awaited.
const ASK_EVERY: Duration = Duration::from_secs(5);

pub(super) async fn restore(migration: &mut Migration<'_>) -> Result<()> {
    let stream = migration.stream.take().ok_or(Error::OutOfOrder("stream"))?;
    let path = format!("/v1/migrations/{}/restore", migration.id);
    let within = migration.request.config.restore_timeout;
    let late = migration.request.config.late_answer_timeout;
    let full = migration.hold_is_full();
    let (running, anew) = {
        let answer = migration.connection.send_stream(
            Method::POST,
            &path,
            HeaderMap::new(),
            stream.bytes,
            within,
        );
        let mut answer = std::pin::pin!(answer);
        let mut tick = tokio::time::interval(TOLD_EVERY);
        let inquiry = Inquiry {
            config: &migration.request.config,
            peer: &migration.peer,
            migration: &migration.id,
            progress: &stream.progress,
        };
        let mut news = std::pin::pin!(inquiry.news());
        loop {
            tokio::select! {
                answer = &mut answer => break (answer.map_err(Error::of_host(&migration.request.to))?, false),
                news = &mut news => break match news? {
                    Some(running) => (running, true),
                    // It may have said why, just now.
                    None => match tokio::time::timeout(late, &mut answer).await {
                        Ok(answer) => (answer.map_err(Error::of_host(&migration.request.to))?, false),
                        Err(_) => return Err(Error::Forgotten(migration.request.to.clone())),
                    },
                },
                _ = tick.tick() => migration.clock.observer.observe(Event::Sent {
                    what: Cargo::Container,
                    bytes: stream.progress.wire(),
                    total: None,
                }),
                () = full.cancelled() => return Err(migration.request.hold_full()),
                () = migration.request.cancel.cancelled() => return Err(Error::Interrupted(migration.clock.phase())),
            }
        }
    };
    if anew {
        // What has been silent for so long is not waited for again.
        match connect(&migration.request.config, &migration.peer).await {
            Ok(connection) => migration.connection = connection,
            Err(error) => tracing::debug!(%error, "the old connection has to do"),
        }
    }
    migration.downtime.part(Part::Restore);
    let there = [
        (Part::Insert, running.insert),
        (Part::Restore, running.restore.saturating_sub(running.admit)),
        (Part::Admit, running.admit),
    ];
    migration.downtime.divide(Part::Transfer, &there);
    let bytes = stream.progress.wire();
    migration.bytes_frozen += bytes;
    migration.bytes_sent += migration.bytes_frozen;
    migration.dump = match (&stream.captured, &migration.shell) {
        (Some(captured), _) => captured
            .get(STATS_DUMP)
            .and_then(|content| DumpStats::parse(&content).ok()),
        (None, Some(shell)) => DumpStats::of(&shell.work),
        (None, None) => None,
    };
    migration.clock.observer.observe(Event::Sent {
        what: Cargo::Container,
        bytes,
        total: Some(bytes),
    });
    migration.at_home = running
        .home
        .iter()
        .filter_map(|place| migration.flows.get(*place))
        .cloned()
        .collect();
    tracing::debug!(restore = ?running.restore, flows = running.flows, "the container runs at the destination");
    Ok(())
}

/// Whom to ask anew, and what about.
struct Inquiry<'a> {
    config: &'a Config,
    peer: &'a Peer,
    migration: &'a MigrationId,
    progress: &'a Progress,
}

impl Inquiry<'_> {
    /// Asks over new connections what has become of the container: whether it runs, or whether the
    /// destination knows nothing of it any more.
    ///
    /// A connection that was cut for half a minute is silent for another: TCP waits for longer and longer
    /// before it tries again, and a destination that was started anew says nothing at all. A new one gets
    /// through at once. While the container is being restored the answer takes as long as that.
    ///
    /// # Errors
    /// When the destination cannot be reached for [`Config::doubt_timeout`], and nothing of the container
    /// goes to it in that time either.
    async fn news(&self) -> Result<Option<Running>> {
        let mut reached = (Instant::now(), self.progress.wire());
        loop {
            tokio::time::sleep(ASK_EVERY).await;
            let sent = self.progress.wire();
            if sent != reached.1 {
                reached = (Instant::now(), sent);
            }
            let mut connection = match connect(self.config, self.peer).await {
                Ok(connection) => connection,
                Err(error) if reached.0.elapsed() >= self.config.doubt_timeout => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::debug!(%error, "asked anew, and not reached");
                    continue;
                }
            };
            reached.0 = Instant::now();
            let path = format!("/v1/migrations/{}", self.migration);
            match connection.call(Method::GET, &path, &Nothing {}).await {
                Ok(Status {
                    stage: Stage::Running,
                    running: Some(running),
                }) => return Ok(Some(running)),
                // It has not had all of the container yet, or is at work on it.
                Ok(Status {
                    stage: Stage::Prepared | Stage::Restoring,
                    ..
                }) => {}
                Ok(_) => return Ok(None),
                Err(error) => tracing::debug!(%error, "asked anew, and no answer"),
            }
        }
    }
}
