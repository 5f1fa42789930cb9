//! Finishing or undoing what an interrupted migration left on this host.

use std::net::IpAddr;

use serde::Serialize;

use super::commit;
use super::effect::{Asked, Effect};
use super::event::Observer;
use super::flows;
use super::forwarding;
use super::journal::{Journal, JournalError, left_behind, number_of};
use super::lock::Lock;
use super::preflight::{must_be_root, podman};
use super::report::Leftover;
use super::undo::{Hands, leave_idle_hops, remove_staging, unwind};
use crate::criu::State;
use crate::tunnel::HopId;
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

/// Which host is to have a container when the other one does not answer. For the operator to say, who can
/// see to it that the other one is silent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// This one. The destination is told to give up its copy, for five seconds. Then the container goes on
    /// here as of the freeze, and nothing that the copy says comes through this host any more. What the
    /// copy does elsewhere this host cannot prevent. The destination is told when `recover` is called
    /// again and it answers.
    Source,
    /// The destination. The container here is removed, frozen as it is.
    Destination,
}

/// Finishes the migrations from this host that were past their point of no return, and undoes the
/// others. `keep` decides where nobody else can: where a destination does not say whether it runs the
/// container.
///
/// # Errors
/// [`Error::InDoubt`] if a destination does not say whether it runs the container, and `keep` neither;
/// that migration stays as it is, all others are recovered, and calling this again is safe.
/// [`Error::NotThere`] if a destination is to keep what it says it does not run.
pub async fn recover(
    config: &Config,
    keep: Option<Keep>,
    observer: &mut dyn Observer,
) -> Result<Vec<Recovered>> {
    must_be_root()?;
    let mut recovered = Vec::new();
    let mut doubt = None;
    for path in left_behind(&config.outgoing_dir())? {
        let journal = match Journal::open(&path) {
            Err(JournalError::InUse { .. }) => continue,
            journal => journal?,
        };
        match recover_one(config, journal, keep, observer).await {
            Ok((finished, leftovers)) => recovered.push(Recovered {
                migration: number_of(&path),
                finished,
                leftovers,
            }),
            // The others are not to wait for it.
            Err(error) => doubt = doubt.or(Some(error)),
        }
    }
    Lock::sweep(config.lock_dir());
    doubt.map_or(Ok(recovered), Err)
}

/// Whether it was finished, and what is left of it.
async fn recover_one(
    config: &Config,
    mut journal: Journal,
    keep: Option<Keep>,
    observer: &mut dyn Observer,
) -> Result<(bool, Vec<Leftover>)> {
    let mut hands = Hands::new(config.clone(), podman(config)?);
    hands.unsure = true;
    if !journal.committed() && !journal.kept_here() {
        match keep {
            Some(Keep::Source) => journal.keep_here()?,
            _ => {
                if runs_elsewhere(&hands, &journal, keep).await? {
                    // Before the destination hears of it: afterwards it knows nothing of the migration.
                    journal.commit()?;
                }
            }
        }
    }
    hands.kept_here = journal.kept_here();
    let finished = journal.committed();
    let leftovers = if finished {
        finish(&hands, &journal, keep).await
    } else {
        unwind(&mut hands, &journal, observer)
            .await
            .map_err(|destination| Error::InDoubt {
                cause: Box::new(Error::Interrupted(super::Phase::Restore)),
                destination,
            })?
    };
    let owed = |leftover: &Leftover| {
        let mut owed = journal.effects().iter().filter(|effect| effect.is_owed());
        owed.any(|effect| effect.to_string() == leftover.effect)
    };
    if leftovers.is_empty() {
        journal.close()?;
    } else if journal.kept_here() && leftovers.iter().all(owed) {
        journal.owed()?;
    }
    Ok((finished, leftovers))
}

/// Whether the destination runs the container. Then the world may have heard of it, and it stays.
///
/// # Errors
/// [`Error::InDoubt`] if the destination was asked to restore it and does not answer now, and the operator
/// has not said that it is to keep it; [`Error::NotThere`] if he has, and it says that it does not.
async fn runs_elsewhere(hands: &Hands, journal: &Journal, keep: Option<Keep>) -> Result<bool> {
    for effect in journal.effects() {
        let Effect::Destination {
            peer,
            migration,
            asked: Asked::Restore,
        } = effect
        else {
            continue;
        };
        let patience = match keep {
            Some(_) => hands.config.give_up_timeout,
            None => hands.config.doubt_timeout,
        };
        match (hands.runs_at(peer, migration, patience).await, keep) {
            (Ok(true), _) | (Err(_), Some(Keep::Destination)) => return Ok(true),
            (Ok(false), Some(Keep::Destination)) => return Err(Error::NotThere(peer.clone())),
            (Ok(false), _) => {}
            (Err(cause), _) => {
                return Err(Error::InDoubt {
                    cause: Box::new(cause),
                    destination: peer.clone(),
                });
            }
        }
    }
    Ok(false)
}

/// Does what a commit had begun, or would have.
///
/// The container goes only when the destination has answered, or when the operator says that it is to be there.
async fn finish(hands: &Hands, journal: &Journal, keep: Option<Keep>) -> Vec<Leftover> {
    let mut leftovers = Vec::new();
    let mut note = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            leftovers.push(Leftover {
                effect: what.to_owned(),
                failure: error.to_string(),
            });
        }
    };
    let freezer = journal.effects().iter().find_map(|effect| match effect {
        Effect::Frozen { freezer } => Some(freezer),
        _ => None,
    });
    let mut gone = true;
    for effect in journal.effects() {
        if let Effect::Destination {
            peer,
            migration,
            asked: Asked::Restore,
        } = effect
        {
            let told = hands.hand_over(peer, migration).await;
            gone &= told.is_ok() || keep == Some(Keep::Destination);
            note("telling the destination", told);
        }
    }
    // From the last to the first, so the container goes while it is still fenced.
    for effect in journal.effects().iter().rev() {
        match effect {
            Effect::Forwarding { container, .. } => note(
                "the way of new connections",
                forwarding::complete(&hands.config, container).await,
            ),
            // What is still there must stay quiet.
            Effect::Fenced { fence } if gone => {
                note("the fence", fence.remove().await.map_err(Into::into))
            }
            Effect::Forget {
                container,
                keep_volumes,
            } if gone => match hands.podman.inspect(container.as_str()).await {
                // It has come back, and runs: what was to be forgotten is frozen.
                Ok(container)
                    if container.is_running()
                        && freezer.is_some_and(|it| matches!(it.state(), Ok(State::Thawed))) => {}
                Ok(container) => {
                    for (what, result) in
                        commit::forget(&hands.podman, &container, *keep_volumes).await
                    {
                        gone &= result.is_ok();
                        note(what, result);
                    }
                }
                Err(error) if error.is_not_found() => {}
                Err(error) => {
                    gone = false;
                    note("the old container", Err(error.into()));
                }
            },
            Effect::Steered { addresses, hop } => note(
                "the connections that went home",
                forget_at_home(&hands.config, addresses, *hop).await,
            ),
            Effect::Staging { directory } => {
                note("the container's memory", remove_staging(directory))
            }
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

/// Forgets the connections that had come by the hop to where the container is now: there they end where they
/// began, and do not come here any more.
async fn forget_at_home(config: &Config, addresses: &[IpAddr], hop: HopId) -> Result<()> {
    let mut flows = flows::of(addresses).await?;
    flows.retain(|flow| flow.came_by() == Some(hop) && flow.goes_by().is_none());
    flows::forget(&flows).await?;
    leave_idle_hops(config).await.map(|_| ())
}
