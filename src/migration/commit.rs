//! The source forgets the container, when it is sure that the destination has it. From then on there is no way
//! back: nothing fails, what cannot be done is reported.

use std::time::Duration;

use hyper::Method;

use super::undo::remove_staging;
use super::{Effect, Leftover, Migration, Part, connect, flows, forwarding, path};
use crate::agent::protocol::{Fetched, Nothing, Stage, Status};
use crate::podman::{Client, Container, RemoveOptions};
use crate::{Error, Result};

pub(super) async fn commit(migration: &mut Migration<'_>) -> Result<()> {
    let container = migration.preflight.container.clone();
    let keep_volumes = migration.request.keep_volumes;
    serve_memory(migration).await?;
    if let Err(doubt) = still_runs(migration).await {
        // `livemig recover` asks again, and lets it go on here if it runs there no more.
        migration.clear_hold().await;
        return Err(doubt);
    }
    // If this cannot be written, a crash from here on finds the destination saying that it runs.
    if let Err(error) = migration.journal.commit() {
        // Not a word to the destination: it has to know of the migration if it is asked.
        migration.note("the journal", Err(error.into()));
        migration.clear_hold().await;
        return Ok(());
    }

    let path = format!("/v1/migrations/{}/commit", migration.id);
    let told = migration
        .connection
        .call(Method::POST, &path, &Nothing {})
        .await;
    // While it does not answer, nobody knows whether it has lost its power after all.
    let mut gone = told.is_ok();
    migration.note(
        "telling the destination that it is over",
        told.map(|Nothing {}| ()).map_err(Into::into),
    );
    migration.clear_hold().await;
    if gone {
        for (what, result) in forget(&migration.hands.podman, &container, keep_volumes).await {
            gone &= result.is_ok();
            migration.note(what, result);
        }
    }
    // What is still there must stay quiet.
    if let Some(fence) = migration.fence.take().filter(|_| gone) {
        migration.note(
            "the rule that kept it quiet",
            fence.remove().await.map_err(Into::into),
        );
    }
    // If nothing is carried on from here, what was before has ended.
    if migration.forwarding.is_none() {
        let ended = forwarding::forget(&migration.request.config, &container.id).await;
        migration.note("the way of new connections", ended);
    }
    // They do not come through here any more.
    let forgotten = flows::forget(&migration.at_home).await;
    migration.note("the connections that went home", forgotten);
    let forgotten = path::forget_in_between(migration).await;
    migration.note("the connections that went home past others", forgotten);
    for effect in migration.journal.effects().to_vec() {
        if let Effect::Staging { directory } = effect {
            let removed = remove_staging(&directory);
            migration.note("the container's memory on its way", removed);
        }
    }
    if migration.leftovers.is_empty() {
        let closed = migration.journal.close();
        migration.note("the journal", closed.map_err(Into::into));
    }
    let shortened = path::shorten(migration).await;
    migration.note("the paths of older connections", shortened);
    Ok(())
}

/// Makes sure that the destination still runs the container, and has it on its disk, which it has when it says
/// so this time: its host may have lost its power since the first.
///
/// # Errors
/// [`Error::NoLongerThere`] if it does not, and [`Error::InDoubt`] if it says nothing.
async fn still_runs(migration: &mut Migration<'_>) -> Result<()> {
    let destination = migration.request.to.clone();
    match runs(migration).await {
        Ok(true) => Ok(()),
        Ok(false) => Err(Error::NoLongerThere(destination)),
        Err(cause) => Err(Error::InDoubt {
            cause: Box::new(cause),
            destination,
        }),
    }
}

async fn runs(migration: &mut Migration<'_>) -> Result<bool> {
    let path = format!("/v1/migrations/{}", migration.id);
    let asked = migration
        .connection
        .call(Method::GET, &path, &Nothing {})
        .await;
    match asked {
        Ok(Status { stage, .. }) => Ok(stage == Stage::Running),
        Err(_) => {
            let (peer, patience) = (
                &migration.request.to,
                migration.request.config.doubt_timeout,
            );
            let runs = migration
                .hands
                .runs_at(peer, &migration.id, patience)
                .await?;
            // What has been silent once is not waited for again.
            migration.connection = connect(&migration.request.config, &migration.peer).await?;
            Ok(runs)
        }
    }
}

/// Serves the destination the memory that it does not have yet, until it says that it has all of it. If that
/// fails nothing is forgotten here: the frozen container is what there is.
async fn serve_memory(migration: &mut Migration<'_>) -> Result<()> {
    let shell = migration.shell.as_mut();
    let Some(serving) = shell.and_then(|shell| shell.serving.take()) else {
        return Ok(());
    };
    let served = serving.ended().await;
    // If it was not served well, the destination may know why.
    let path = format!("/v1/migrations/{}/fetched", migration.id);
    let told = migration.connection.call(Method::POST, &path, &Nothing {});
    let Fetched { answered, unread } = told.await.map_err(Error::of_host(&migration.request.to))?;
    migration.bytes_sent += served?;
    if let Some(answered) = answered {
        migration.downtime.prolong_until(answered, Part::Fetch);
    }
    migration.unread = unread;
    Ok(())
}

impl Migration<'_> {
    /// Waits until the rules are gone by which packets waited, and takes down what became of them.
    async fn clear_hold(&mut self) {
        if let Some(released) = self.released.take() {
            match released.clear().await {
                Ok(held) => self.held = held,
                Err(error) => self.note("the rules by which packets waited", Err(error.into())),
            }
        }
    }

    /// Past the point of no return nothing fails; what did not work is reported.
    pub(super) fn note(&mut self, what: &str, result: Result<()>) {
        if let Err(error) = result {
            tracing::warn!(what, %error, "could not be tidied");
            self.leftovers.push(Leftover {
                effect: what.to_owned(),
                failure: error.full(),
            });
        }
    }
}

/// Removes a container that runs elsewhere now. It is fenced, so no peer hears its sockets die.
pub(super) async fn forget(
    podman: &Client,
    container: &Container,
    keep_volumes: bool,
) -> Vec<(&'static str, Result<()>)> {
    let options = RemoveOptions {
        force: true,
        timeout: Some(Duration::ZERO),
        volumes: !keep_volumes,
    };
    let removed = podman.remove(&container.id, options).await;
    let mut done = vec![(
        "removing the old container",
        removed.map(|_| ()).map_err(Into::into),
    )];
    if !keep_volumes {
        for volume in container.volumes() {
            done.push((
                "removing a volume that moved",
                remove_volume(podman, volume).await,
            ));
        }
    }
    done
}

/// A volume that another container uses stays.
async fn remove_volume(podman: &Client, name: &str) -> Result<()> {
    match podman.remove_volume(name).await {
        Err(error) if error.is_in_use() => Ok(()),
        other => Ok(other.map(|_| ())?),
    }
}
