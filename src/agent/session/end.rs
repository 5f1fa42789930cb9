//! How a migration to this host ends: the source hands the container over, or takes it back, or has gone
//! silent, or is trusted no more.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::super::Peers;
use super::super::endings::Endings;
use super::super::protocol::{MigrationId, Nothing, Stage, Undone};
use super::arrival::gate;
use super::{Session, Sessions};
use crate::conntrack::hold::{Hold, Intake};
use crate::criu::Freezer;
use crate::migration::{self, Effect, Hands, Journal};
use crate::{Error, conntrack};

/// How often the forsaken are looked for.
const LOOK_ROUND: Duration = Duration::from_secs(10);

/// How often, while migrations are coming, their sources are looked for among the known hosts.
const TRUST_ROUND: Duration = Duration::from_millis(500);

impl Sessions {
    /// For as long as the agent runs: undoes the migrations whose source has gone silent before
    /// anything runs here, and removes the hops that no connection uses any more.
    pub async fn look_after(self: Arc<Self>) {
        let mut round = tokio::time::interval(LOOK_ROUND);
        let mut trust = tokio::time::interval(TRUST_ROUND);
        let mut endings = Endings::default();
        loop {
            tokio::select! {
                _ = round.tick() => {}
                _ = trust.tick() => {
                    self.undo_of_strangers().await;
                    continue;
                }
                () = endings.next() => {}
            }
            match migration::leave_idle_hops(&self.config).await {
                Ok(hops_are_left) => endings.listen(hops_are_left),
                Err(error) => {
                    tracing::warn!(%error, "hops that nobody uses could not be removed");
                }
            }
            self.paths.look_after().await;
            for (id, session) in self.open() {
                // One that is at work is not forsaken.
                let Ok(mut session) = session.state.try_lock() else {
                    continue;
                };
                if session.stage == Stage::Prepared
                    && session.heard_of.elapsed() >= self.config.forsaken_timeout
                {
                    tracing::warn!(migration = %id, "its source has gone silent: undoing it");
                    if let Err(error) = self.undo(&id, &mut session).await {
                        tracing::error!(migration = %id, %error, "it could not be undone");
                    }
                }
            }
        }
    }

    /// Undoes what hosts have prepared that are not known any more. What runs stays: its source has
    /// let go of it, or may have.
    async fn undo_of_strangers(&self) {
        let open = self.open();
        if open.is_empty() {
            return;
        }
        let known = Peers::open(&self.config.state_dir, &self.config.limits).and_then(|p| p.list());
        let known = match known {
            Ok(known) => known,
            Err(error) => {
                tracing::warn!(%error, "it cannot be seen whether sources are still trusted");
                return;
            }
        };
        for (id, session) in open {
            if known.iter().any(|peer| peer.lasting() == session.peer) {
                continue;
            }
            // A request that is being worked on ends first.
            let Ok(mut session) = session.state.try_lock() else {
                continue;
            };
            if session.stage == Stage::Prepared {
                tracing::warn!(migration = %id, "its source is trusted no more: undoing it");
                if let Err(error) = self.undo(&id, &mut session).await {
                    tracing::error!(migration = %id, %error, "it could not be undone");
                }
            }
        }
    }

    /// The source has let go: from now on the container is this host's.
    pub(super) async fn commit(
        &self,
        id: &MigrationId,
        session: &mut Session,
    ) -> Result<Nothing, Error> {
        if session.stage != Stage::Running {
            return Err(Error::OutOfOrder("running container"));
        }
        session.journal.commit()?;
        if let Some(shell) = session.shell.take() {
            // When this is answered the source removes its own.
            shell.recorded().await?;
        }
        // The source may not have been able to say so.
        self.release(session).await?;
        if let Some(intake) = session.intake.take() {
            let report = intake.finish().await?.clear().await?;
            tracing::debug!(migration = %id, ?report, "what came for the container was let in");
        }
        gate(&session.offer.container).remove().await?;
        let_memory_go(&session.journal)?;
        self.gather(&session.journal).await;
        self.close(id, session)?;
        // Hops that no connection needs would only be in the way. The source does not wait for that.
        let config = self.config.clone();
        tokio::spawn(async move {
            if let Err(error) = migration::leave_idle_hops(&config).await {
                tracing::warn!(%error, "hops that nobody uses could not be removed");
            }
        });
        Ok(Nothing {})
    }

    /// Brings the processes of what came together in its cgroup: see [`Freezer::gather`]. The container
    /// runs whether or not that succeeds.
    pub(super) async fn gather(&self, journal: &Journal) {
        for container in journal.effects().iter().filter_map(Effect::restored) {
            let gathered = async {
                let pid = self.podman.inspect(container.as_str()).await?.pid;
                let pid = pid.ok_or(Error::OutOfOrder("process"))?;
                let root = Path::new("/");
                Ok::<_, Error>(Freezer::of(pid, root)?.gather(pid, root)?)
            };
            match gathered.await {
                Ok(0) => {}
                Ok(moved) => tracing::debug!(%container, moved, "gathered in its cgroup"),
                Err(error) => {
                    tracing::warn!(%container, %error, "processes of it may be outside of its cgroup");
                }
            }
        }
    }

    /// Undoes everything. An error means that the container may still be here.
    pub(super) async fn undo(
        &self,
        id: &MigrationId,
        session: &mut Session,
    ) -> Result<Undone, Error> {
        if let Some(shell) = session.shell.take() {
            shell.abandon().await;
        }
        let holds = session.hold.take().into_iter();
        let holds = holds.chain(session.intake.take().map(Intake::into_hold));
        let leftovers = self
            .unwind(&session.journal, holds.collect(), session.unsure)
            .await;
        self.make_sure_it_is_gone(&session.journal, &leftovers)
            .await?;
        session.stage = Stage::Unknown;
        self.sessions().remove(id);
        if leftovers.is_empty() {
            session.journal.close()?;
        }
        Ok(Undone { leftovers })
    }

    /// Undoes what a journal names. `unsure`: Podman may still be at work on it.
    pub(super) async fn unwind(
        &self,
        journal: &Journal,
        holds: Vec<Hold>,
        unsure: bool,
    ) -> Vec<String> {
        let mut hands = Hands::new(self.config.clone(), self.podman.clone());
        hands.holds = holds;
        hands.unsure = unsure;
        // Nothing that an incoming migration does is in doubt: there is nobody to ask.
        let leftovers = migration::unwind(&mut hands, journal, &mut |_event| {})
            .await
            .unwrap_or_default();
        leftovers.iter().map(ToString::to_string).collect()
    }

    pub(super) fn close(&self, id: &MigrationId, session: &mut Session) -> Result<(), Error> {
        session.journal.close()?;
        self.sessions().remove(id);
        Ok(())
    }
}

/// Removes the rules that keep packets from the container of an agent that has ended: by those of a hold
/// none wait any more, and it may have died after Podman had restored the container and before it could
/// open the gate.
pub(super) async fn let_in(journal: &Journal) -> Result<(), Error> {
    for effect in journal.effects() {
        match effect {
            Effect::Hold { spec } => conntrack::hold::remove_rules(spec).await?,
            Effect::Closed { gate } => gate.remove().await?,
            _ => {}
        }
    }
    Ok(())
}

/// Removes the memory that the container has been restored from.
pub(super) fn let_memory_go(journal: &Journal) -> Result<(), Error> {
    for effect in journal.effects() {
        if let Effect::Staging { directory } = effect {
            migration::remove_staging(directory)?;
        }
    }
    Ok(())
}
