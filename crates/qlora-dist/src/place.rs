//! Where a process stands among those of its run, from the variables that launchers set.
//!
//! | launcher | variables |
//! |---|---|
//! | torchrun | `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR`, `MASTER_PORT` |
//! | Kubeflow | `PET_NODE_RANK`, `PET_NNODES`, `PET_NPROC_PER_NODE` (1), `PET_MASTER_ADDR`, `PET_MASTER_PORT` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK`, `_LOCAL_SIZE` |
//! | Slurm's `srun` | `SLURM_PROCID`, `SLURM_NTASKS`, `SLURM_LOCALID`, `SLURM_JOB_NODELIST` and others |
//! | PMI (MPICH, Intel MPI) | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID`, `MPI_LOCALNRANKS` |
//!
//! The first of them that is there counts: what starts a process last has the most to say, and `mpirun` within an allocation
//! of Slurm leaves Slurm's variables beside its own. `MASTER_ADDR` and `MASTER_PORT` go before what is derived; only where torchrun
//! says that it listens on `MASTER_PORT` itself (`TORCHELASTIC_USE_AGENT_STORE`), another port is derived from it.

mod slurm;
#[cfg(test)]
mod tests;

use std::fmt;

use crate::error::DistError;

/// Ports that are derived lie here, below those that systems give to outgoing connections.
const FIRST_PORT: u64 = 20_000;
const PORTS: u64 = 12_000;
/// torchrun's.
const DEFAULT_PORT: u16 = 29_500;

/// What started a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Launcher {
    /// Nothing that says so: the process is alone.
    Alone,
    /// `qlora train --gpus`.
    Qlora,
    /// torchrun, or anything that sets its variables.
    Torchrun,
    /// Kubeflow's trainer, without torchrun.
    Kubeflow,
    /// Slurm's srun.
    Slurm,
    /// Open MPI's mpirun.
    OpenMpi,
    /// A launcher that speaks PMI.
    Pmi,
}

impl fmt::Display for Launcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Alone => "itself",
            Self::Qlora => "--gpus",
            Self::Torchrun => "torchrun",
            Self::Kubeflow => "Kubeflow",
            Self::Slurm => "Slurm",
            Self::OpenMpi => "Open MPI",
            Self::Pmi => "PMI",
        })
    }
}

/// A process among those of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Its number in the run, from 0.
    pub rank: usize,
    /// Processes in the run.
    pub world_size: usize,
    /// Its number on its host, from 0.
    pub local_rank: usize,
    /// Processes of the run on its host, as far as the launcher says.
    pub local_world_size: usize,
    /// Rank 0's host.
    pub master_addr: String,
    /// Rank 0's port.
    pub master_port: u16,
    /// What started it.
    pub launcher: Launcher,
    /// What tells runs apart that meet on one port; empty where the launcher has no name for a run.
    pub run: String,
}

impl Place {
    /// Set by `qlora train --gpus` beside torchrun's variables, to a name of the run.
    pub const RUN_VARIABLE: &'static str = "QLORA_RUN";

    /// A process that has nobody beside it.
    pub fn alone() -> Self {
        Self {
            rank: 0,
            world_size: 1,
            local_rank: 0,
            local_world_size: 1,
            master_addr: "127.0.0.1".into(),
            master_port: DEFAULT_PORT,
            launcher: Launcher::Alone,
            run: String::new(),
        }
    }

    /// The place of rank 0 of `count` ranks that this program starts on this host, at a port of loopback that is free now, in a run whose
    /// name no other run of the host has. Others differ in `rank` and `local_rank`.
    ///
    /// # Errors
    /// The host gives no port.
    pub fn first_of(count: usize) -> std::io::Result<Self> {
        let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|listener| listener.local_addr())?.port();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            world_size: count,
            local_world_size: count,
            master_port: port,
            launcher: Launcher::Qlora,
            run: format!("process {}, {}", std::process::id(), now.as_nanos()),
            ..Self::alone()
        })
    }

    /// The number of the card that is this process's among those that it sees. `visible` is what limits them, in the form of
    /// `CUDA_VISIBLE_DEVICES`: a scheduler that shows each rank its own card alone calls it 0 in each.
    pub fn card(&self, visible: Option<&str>) -> usize {
        let one = visible.is_some_and(|list| !list.trim().is_empty() && !list.contains(','));
        if one { 0 } else { self.local_rank }
    }

    /// The place of this process.
    ///
    /// # Errors
    /// As [`Place::find`].
    pub fn from_env() -> Result<Self, DistError> {
        Self::find(&|name| std::env::var(name).ok())
    }

    /// The place that the variables say, which `lookup` finds by name. Empty ones count as not set.
    ///
    /// # Errors
    /// A variable is missing, is no number, or contradicts another one.
    pub fn find(lookup: &dyn Fn(&str) -> Option<String>) -> Result<Self, DistError> {
        let vars = Vars(lookup);
        let place = if vars.has("RANK") || vars.has("WORLD_SIZE") {
            torchrun(&vars)
        } else if vars.has("PET_NNODES") {
            kubeflow(&vars)
        } else if vars.has("OMPI_COMM_WORLD_SIZE") || vars.has("OMPI_COMM_WORLD_RANK") {
            open_mpi(&vars)
        } else if vars.has("SLURM_STEP_ID") && vars.has("SLURM_PROCID") {
            slurm::place(&vars)
        } else if vars.has("PMI_SIZE") || vars.has("PMI_RANK") {
            pmi(&vars)
        } else {
            Ok(Self::alone())
        }?;
        // One process needs nobody's address, whoever started it.
        Ok(if place.world_size == 1 { Self { launcher: place.launcher, ..Self::alone() } } else { place })
    }

    /// Whether nobody is beside it.
    pub fn is_alone(&self) -> bool {
        self.world_size == 1
    }

    /// Whether it is the rank that writes.
    pub fn is_first(&self) -> bool {
        self.rank == 0
    }

    /// Rank 0's address, as `host:port`.
    pub fn address(&self) -> String {
        match self.master_addr.contains(':') {
            true => format!("[{}]:{}", self.master_addr, self.master_port),
            false => format!("{}:{}", self.master_addr, self.master_port),
        }
    }

    /// The variables by which a process that is started learns this place. Those of other launchers count for nothing beside
    /// them.
    pub fn to_env(&self) -> [(&'static str, String); 7] {
        [
            ("RANK", self.rank.to_string()),
            ("WORLD_SIZE", self.world_size.to_string()),
            ("LOCAL_RANK", self.local_rank.to_string()),
            ("LOCAL_WORLD_SIZE", self.local_world_size.to_string()),
            ("MASTER_ADDR", self.master_addr.clone()),
            ("MASTER_PORT", self.master_port.to_string()),
            (Self::RUN_VARIABLE, self.run.clone()),
        ]
    }
}

/// The environment.
pub(crate) struct Vars<'a>(&'a dyn Fn(&str) -> Option<String>);

impl Vars<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.0)(name).map(|value| value.trim().to_string()).filter(|value| !value.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.get(name).is_some()
    }

    /// A number, where it is set.
    fn number(&self, name: &str) -> Result<Option<usize>, DistError> {
        // No run has so many processes, and no sum of such numbers overflows.
        const MOST: usize = 1 << 20;
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(number) if number <= MOST => Ok(Some(number)),
            _ => Err(wrong(name, &value, "it must be a number of processes")),
        }
    }

    fn needed(&self, name: &str, beside: &str) -> Result<usize, DistError> {
        let because = format!("{beside} is");
        let cure = "the launcher sets both; for a process alone, unset both".to_string();
        self.number(name)?.ok_or_else(|| DistError::Missing { name: name.into(), because, cure })
    }

    fn port(&self, name: &str) -> Result<Option<u16>, DistError> {
        let Some(value) = self.get(name) else { return Ok(None) };
        match value.parse() {
            Ok(port) if port > 0 => Ok(Some(port)),
            _ => Err(wrong(name, &value, "it must be a port, from 1 to 65535")),
        }
    }

    /// Rank and world size, which must fit each other.
    fn rank_of(&self, rank: &str, size: &str) -> Result<(usize, usize), DistError> {
        let (number, world_size) = (self.needed(rank, size)?, self.needed(size, rank)?);
        if number >= world_size {
            let problem = format!("ranks go from 0 to below {size}, which is {world_size}");
            return Err(wrong(rank, &number.to_string(), &problem));
        }
        Ok((number, world_size))
    }

    /// Rank and number of ranks on this host, which must fit each other where both are known.
    fn local(&self, rank: &str, size: &str, world_size: usize) -> Result<(usize, usize), DistError> {
        let local_rank = self.number(rank)?.unwrap_or(0);
        let local_size = self.number(size)?.unwrap_or(local_rank + 1);
        if local_rank >= local_size {
            let problem = format!("ranks of a host go from 0 to below {size}, which is {local_size}");
            return Err(wrong(rank, &local_rank.to_string(), &problem));
        }
        if local_size > world_size {
            let problem = format!("a host can't have more ranks than the run, which has {world_size}");
            return Err(wrong(if self.has(size) { size } else { rank }, &local_size.to_string(), &problem));
        }
        Ok((local_rank, local_size))
    }

    /// Rank 0's address where ranks were started by something that has none for them: loopback where all are on one host.
    fn master(&self, run: &str, one_host: bool, because: &str) -> Result<(String, u16), DistError> {
        let addr = match self.get("MASTER_ADDR") {
            Some(addr) => addr,
            None if one_host => "127.0.0.1".into(),
            None => {
                let cure = "set it to rank 0's host for all ranks (mpirun: -x MASTER_ADDR=HOST)".into();
                return Err(DistError::Missing { name: "MASTER_ADDR".into(), because: because.into(), cure });
            }
        };
        let port = self.port("MASTER_PORT")?;
        Ok((addr, port.unwrap_or_else(|| if run.is_empty() { DEFAULT_PORT } else { derived_port(run) })))
    }
}

fn wrong(name: &str, value: &str, problem: &str) -> DistError {
    let shown: String = value.chars().filter(|c| !c.is_control()).take(80).collect();
    DistError::Variable { name: name.into(), value: shown, problem: problem.into() }
}

/// A port that follows from the name of a run: FNV-1a, so that it is the same on every host.
fn derived_port(run: &str) -> u16 {
    let hash = run
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    u16::try_from(FIRST_PORT + (hash >> 16) % PORTS).unwrap_or(DEFAULT_PORT)
}

fn torchrun(vars: &Vars<'_>) -> Result<Place, DistError> {
    let (rank, world_size) = vars.rank_of("RANK", "WORLD_SIZE")?;
    if world_size == 1 {
        return Ok(Place { launcher: Launcher::Torchrun, ..Place::alone() });
    }
    let (local_rank, local_world_size) = vars.local("LOCAL_RANK", "LOCAL_WORLD_SIZE", world_size)?;
    let missing = |name: &str| DistError::Missing {
        name: name.into(),
        because: format!("WORLD_SIZE is {world_size}"),
        cure: "set it to where rank 0 is; torchrun does".into(),
    };
    let ours = vars.get(Place::RUN_VARIABLE);
    let run = ours.clone().or_else(|| vars.get("TORCHELASTIC_RUN_ID")).unwrap_or_default();
    let port = vars.port("MASTER_PORT")?.ok_or_else(|| missing("MASTER_PORT"))?;
    // torchrun itself listens on the port that it names, and says so.
    let taken = vars.get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
    Ok(Place {
        rank,
        world_size,
        local_rank,
        local_world_size,
        master_addr: vars.get("MASTER_ADDR").ok_or_else(|| missing("MASTER_ADDR"))?,
        master_port: if taken && ours.is_none() { derived_port(&format!("{port} of {run}")) } else { port },
        launcher: if ours.is_some() { Launcher::Qlora } else { Launcher::Torchrun },
        run,
    })
}

fn kubeflow(vars: &Vars<'_>) -> Result<Place, DistError> {
    let processes = vars.get("PET_NPROC_PER_NODE").unwrap_or_else(|| "1".into());
    if processes != "1" {
        let problem =
            "one process of each pod is started here: have torchrun --no-python start several, or ask for one";
        return Err(wrong("PET_NPROC_PER_NODE", &processes, problem));
    }
    let (rank, world_size) = match vars.number("PET_NNODES")? {
        Some(1) => (0, 1),
        _ => vars.rank_of("PET_NODE_RANK", "PET_NNODES")?,
    };
    let missing = |name: &str| DistError::Missing {
        name: name.into(),
        because: format!("PET_NNODES is {world_size}"),
        cure: "the trainer sets it to where rank 0 is".into(),
    };
    let alone = Place { launcher: Launcher::Kubeflow, ..Place::alone() };
    if world_size == 1 {
        return Ok(alone);
    }
    Ok(Place {
        rank,
        world_size,
        master_addr: vars.get("PET_MASTER_ADDR").ok_or_else(|| missing("PET_MASTER_ADDR"))?,
        master_port: vars.port("PET_MASTER_PORT")?.ok_or_else(|| missing("PET_MASTER_PORT"))?,
        ..alone
    })
}

fn open_mpi(vars: &Vars<'_>) -> Result<Place, DistError> {
    let (rank, world_size) = vars.rank_of("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")?;
    let (local_rank, local_world_size) =
        vars.local("OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", world_size)?;
    let names = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"];
    let run = names.into_iter().find_map(|name| vars.get(name)).unwrap_or_default();
    let because = format!("Open MPI's {world_size} ranks are on several hosts");
    let (master_addr, master_port) = vars.master(&run, local_world_size == world_size, &because)?;
    let launcher = Launcher::OpenMpi;
    Ok(Place { rank, world_size, local_rank, local_world_size, master_addr, master_port, launcher, run })
}

fn pmi(vars: &Vars<'_>) -> Result<Place, DistError> {
    let (rank, world_size) = vars.rank_of("PMI_RANK", "PMI_SIZE")?;
    if world_size == 1 {
        return Ok(Place { launcher: Launcher::Pmi, ..Place::alone() });
    }
    let (local_rank, local_world_size) = vars.local("MPI_LOCALRANKID", "MPI_LOCALNRANKS", world_size)?;
    let because = "PMI does not say that all ranks are on one host";
    let (master_addr, master_port) = vars.master("", local_world_size == world_size, because)?;
    let (launcher, run) = (Launcher::Pmi, String::new());
    Ok(Place { rank, world_size, local_rank, local_world_size, master_addr, master_port, launcher, run })
}
