//! Copying while the container runs.
//!
//! The rest engine makes no rounds: Podman's API writes one pre-dump at most, and cannot restore from it.
//! The phase stands in the list so that a report has the same phases whatever the engine.
//!
//! With the direct engine the container's files go ahead ([`bundle::changes`]): all that it has changed, then
//! what has changed in that time, for as long as that gets less. What is left then goes with the memory.

use bytes::Bytes;
use futures::{Stream, StreamExt};
use hyper::{HeaderMap, Method};

use super::{Cargo, Event, Migration, freeze};
use crate::agent::protocol::Nothing;
use crate::bundle::{self, Compression, Mirror, Pace, Source};
use crate::podman::{Container, Mount};
use crate::{Error, Result};

/// So few bytes are sent in the last round as quickly as in another one before.
const FEW: u64 = 1 << 20;
/// No more rounds than this, as with CRIU's p.haul (8): what changes as fast as it is sent never gets less.
const MOST_ROUNDS: usize = 8;

pub(super) async fn precopy(migration: &mut Migration<'_>) -> Result<()> {
    if migration.shell.is_none() {
        return Ok(());
    }
    let mut mirror = Mirror::new(sources(&migration.preflight.container)?);
    let mut before = u64::MAX;
    for _ in 0..MOST_ROUNDS {
        migration.may_go_on(migration.clock.phase())?;
        let (changes, round) = mirror.stream(Pace::Running);
        let sent = send(migration, changes.boxed()).await;
        // If the round has failed, that is why the stream ended early.
        mirror = round.await?.mirror;
        let sent = sent?;
        // The end of an archive, and nothing in it, is less as well.
        if sent <= FEW || sent > before / 2 {
            break;
        }
        before = sent;
    }
    migration.mirror = Some(mirror);
    Ok(())
}

/// Sends one round, and says how many bytes that were.
async fn send<S>(migration: &mut Migration<'_>, changes: S) -> Result<u64>
where
    S: Stream<Item = bundle::Result<Bytes>> + Send + 'static,
{
    let (bytes, progress) = bundle::send(changes, Compression::None);
    let path = format!("/v1/migrations/{}/files", migration.id);
    let within = migration.request.config.shell_timeout;
    let Nothing {} = migration
        .connection
        .send_stream(Method::PUT, &path, HeaderMap::new(), bytes, within)
        .await
        .map_err(Error::of_host(&migration.request.to))?;
    migration.bytes_sent += progress.wire();
    migration.clock.observer.observe(Event::Sent {
        what: Cargo::Files,
        bytes: progress.wire(),
        total: Some(progress.wire()),
    });
    Ok(progress.content())
}

/// The trees in which a container has files of its own.
fn sources(container: &Container) -> Result<Vec<Source>> {
    let mut sources = vec![Source::rootfs(freeze::layers(container)?)];
    // Not there with `--ipc none`.
    let shm = container.static_dir.join("shm");
    if shm.is_dir() {
        sources.push(Source::shm(shm));
    }
    sources.extend(container.mounts.iter().filter_map(|mount| match mount {
        Mount::Volume { name, source, .. } => Some(Source::volume(name, source.clone())),
        _ => None,
    }));
    Ok(sources)
}
