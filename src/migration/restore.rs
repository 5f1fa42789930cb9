//! The one round trip of the downtime: the container goes out, "running" comes back.

use std::time::Duration;

use hyper::{HeaderMap, Method};

use super::{Cargo, Event, Migration, Part};
use crate::agent::protocol::Running;
use crate::bundle::splice::STATS_DUMP;
use crate::criu::DumpStats;
use crate::{Error, Result};

/// How often the observer is told how much has been sent.
const TOLD_EVERY: Duration = Duration::from_millis(250);

pub(super) async fn restore(migration: &mut Migration<'_>) -> Result<()> {
    let stream = migration.stream.take().ok_or(Error::OutOfOrder("stream"))?;
    let path = format!("/v1/migrations/{}/restore", migration.id);
    let within = migration.request.config.restore_timeout;
    let full = migration.hold_is_full();
    let answer = migration.connection.send_stream(
        Method::POST,
        &path,
        HeaderMap::new(),
        stream.bytes,
        within,
    );
    let mut answer = std::pin::pin!(answer);
    let mut tick = tokio::time::interval(TOLD_EVERY);
    let running: Running = loop {
        tokio::select! {
            answer = &mut answer => break answer.map_err(Error::of_host(&migration.request.to))?,
            _ = tick.tick() => migration.clock.observer.observe(Event::Sent {
                what: Cargo::Container,
                bytes: stream.progress.wire(),
                total: None,
            }),
            () = full.cancelled() => return Err(migration.request.hold_full()),
            () = migration.request.cancel.cancelled() => return Err(Error::Interrupted(migration.clock.phase())),
        }
    };
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
    let statistics = match (&stream.captured, &migration.shell) {
        (Some(captured), _) => captured.get(STATS_DUMP),
        (None, Some(shell)) => std::fs::read(shell.work.join(STATS_DUMP)).ok(),
        (None, None) => None,
    };
    migration.dump = statistics.and_then(|image| DumpStats::parse(&image).ok());
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
