//! Finishing or undoing what an interrupted migration left on this host.

use hyper::Method;
use serde::Serialize;

use super::commit;
use super::effect::{Asked, Effect};
use super::event::Observer;
use super::journal::{Journal, JournalError, left_behind};
use super::preflight::{connect, must_be_root, peer, podman};
use super::report::Leftover;
use super::undo::{Hands, unwind};
use crate::agent::protocol::{MigrationId, Nothing, Stage, Status};
use crate::{Config, Error, Result};

/// What became of one interrupted migration.
#[derive(Debug, Clone, Serialize)]
pub struct Recovered {
    /// The migration's number.
    pub migration: String,
    /// Whether it was finished; otherwise it was undone.
    pub finished: bool,
    /// What is still left of it.
    pub leftovers: Vec<Leftover>,
}

/// Finishes the migrations from this host that were past their point of no return, and undoes the
/// others.
///
/// # Errors
/// [`Error::InDoubt`] if a destination does not say whether it runs the container; whatever else was
/// interrupted is still there too, and calling this again is safe.
pub async fn recover(config: &Config, observer: &mut dyn Observer) -> Result<Vec<Recovered>> {
    must_be_root()?;
    let mut recovered = Vec::new();
    for path in left_behind(&config.outgoing_dir())? {
        let journal = match Journal::open(&path) {
            Err(JournalError::InUse { .. }) => continue,
            journal => journal?,
        };
        let migration = path
            .file_stem()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default();
        let mut hands = Hands::new(config.clone(), podman(config)?);
        let finished = journal.committed() || runs_elsewhere(config, &journal).await?;
        let leftovers = if finished {
            finish(&hands, &journal).await
        } else {
            unwind(&mut hands, &journal, observer)
                .await
                .map_err(|destination| Error::InDoubt {
                    cause: Box::new(Error::Interrupted(super::Phase::Restore)),
                    destination,
                })?
        };
        if leftovers.is_empty() {
            journal.close()?;
        }
        recovered.push(Recovered {
            migration,
            finished,
            leftovers,
        });
    }
    Ok(recovered)
}

/// Whether the destination runs the container. Then the world may have heard of it, and it stays.
///
/// # Errors
/// [`Error::InDoubt`] if the destination was asked to restore it and does not answer now.
async fn runs_elsewhere(config: &Config, journal: &Journal) -> Result<bool> {
    for effect in journal.effects() {
        let Effect::Destination {
            peer: name,
            migration,
            asked: Asked::Restore,
        } = effect
        else {
            continue;
        };
        let asked = async {
            let mut connection = connect(config, &peer(config, name)?).await?;
            let path = format!("/v1/migrations/{migration}");
            let status: Status = connection.call(Method::GET, &path, &Nothing {}).await?;
            Ok::<_, Error>(status.stage)
        };
        let stage = asked.await.map_err(|cause| Error::InDoubt {
            cause: Box::new(cause),
            destination: name.clone(),
        })?;
        if stage == Stage::Running {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Does what a commit had begun, or would have.
async fn finish(hands: &Hands, journal: &Journal) -> Vec<Leftover> {
    let mut leftovers = Vec::new();
    let mut note = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            leftovers.push(Leftover {
                effect: what.to_owned(),
                failure: error.to_string(),
            });
        }
    };
    // From the last to the first, so the container goes while it is still fenced.
    for effect in journal.effects().iter().rev() {
        match effect {
            Effect::Destination {
                peer: name,
                migration,
                asked: Asked::Restore,
            } => {
                note(
                    "telling the destination",
                    tell(&hands.config, name, migration).await,
                );
            }
            Effect::Fenced { fence } => note("the fence", fence.remove().await.map_err(Into::into)),
            Effect::Forget {
                container,
                keep_volumes,
            } => match hands.podman.inspect(container.as_str()).await {
                Ok(container) => {
                    for (what, result) in
                        commit::forget(&hands.podman, &container, *keep_volumes).await
                    {
                        note(what, result);
                    }
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => note("the old container", Err(error.into())),
            },
            Effect::Hold { spec } => {
                note(
                    "packets waiting",
                    crate::conntrack::hold::remove_rules(spec)
                        .await
                        .map_err(Into::into),
                );
            }
            _ => {}
        }
    }
    leftovers
}

/// Tells the destination that the container is its own from now on.
async fn tell(config: &Config, name: &str, migration: &MigrationId) -> Result<()> {
    let mut connection = connect(config, &peer(config, name)?).await?;
    let path = format!("/v1/migrations/{migration}/commit");
    let Nothing {} = connection.call(Method::POST, &path, &Nothing {}).await?;
    Ok(())
}
