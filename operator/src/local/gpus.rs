//! Which group computes on which GPUs of this machine.
//!
//! A group's process sees its own GPUs alone, through `CUDA_VISIBLE_DEVICES`, and keeps them through restarts. Whoever
//! sets that variable for the operator says which GPUs it may hand out. A machine whose GPUs cannot be counted is not
//! judged here: the worker says what is missing, in its own words.

use std::{env, fs, path::Path};

/// What names the GPUs that a process sees.
pub const VARIABLE: &str = "CUDA_VISIBLE_DEVICES";

/// The GPUs that may be handed out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Pool {
    /// These, by index or UUID: somebody said so.
    Named(Vec<String>),
    /// So many, from 0.
    Counted(usize),
    /// Nobody knows: there is no driver whose devices could be counted.
    Unknown,
}

/// GPUs that one model needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Demand<'a> {
    /// The model.
    pub model: &'a str,
    /// Its groups.
    pub groups: usize,
    /// GPUs of each group; 0 on the CPU.
    pub ranks: usize,
}

impl Pool {
    /// What this machine has, or what the operator was given of it.
    pub fn of_this_machine() -> Self {
        match env::var(VARIABLE) {
            Ok(list) => Self::named(&list),
            Err(_) => Self::counted(Path::new("/dev")),
        }
    }

    /// CUDA reads the list up to the first entry that names nothing.
    fn named(list: &str) -> Self {
        let names = list.split(',').map(str::trim);
        let there = names.take_while(|name| !name.is_empty() && *name != "-1");
        Self::Named(there.map(str::to_owned).collect())
    }

    /// The driver makes a device file for each GPU. A container may hold any of them; its programs count from 0.
    fn counted(devices: &Path) -> Self {
        let is_gpu = |name: &str| {
            name.strip_prefix("nvidia")
                .is_some_and(|number| !number.is_empty() && number.chars().all(|c| c.is_ascii_digit()))
        };
        let files = fs::read_dir(devices).into_iter().flatten().flatten();
        match files
            .filter(|file| file.file_name().to_str().is_some_and(is_gpu))
            .count()
        {
            0 => Self::Unknown,
            count => Self::Counted(count),
        }
    }

    fn len(&self) -> Option<usize> {
        match self {
            Self::Named(names) => Some(names.len()),
            Self::Counted(count) => Some(*count),
            Self::Unknown => None,
        }
    }

    fn name(&self, i: usize) -> String {
        match self {
            Self::Named(names) => names[i].clone(),
            Self::Counted(_) | Self::Unknown => i.to_string(),
        }
    }
}

/// The value of `CUDA_VISIBLE_DEVICES` for each group of each model, in their order; `None` for groups on the CPU.
///
/// # Errors
/// There are fewer GPUs than groups need: one line.
pub fn assign(pool: &Pool, demands: &[Demand<'_>]) -> Result<Vec<Vec<Option<String>>>, String> {
    let needed: usize = demands.iter().map(|demand| demand.groups * demand.ranks).sum();
    if let Some(there) = pool.len().filter(|there| *there < needed) {
        let each: Vec<String> = demands
            .iter()
            .filter(|demand| demand.ranks > 0)
            .map(|demand| format!("{} ({} x {})", demand.model, demand.groups, demand.ranks))
            .collect();
        let whose = match pool {
            Pool::Named(_) => "CUDA_VISIBLE_DEVICES names",
            Pool::Counted(_) | Pool::Unknown => "this machine has",
        };
        return Err(format!(
            "{needed} GPUs are needed for {}, replicas x parallelism.tensor, and {whose} {there}: lower one of them",
            each.join(", ")
        ));
    }
    let mut next = 0;
    let mut group = |ranks: usize| {
        let names: Vec<String> = (next..next + ranks).map(|i| pool.name(i)).collect();
        next += ranks;
        (ranks > 0).then(|| names.join(","))
    };
    Ok(demands
        .iter()
        .map(|demand| (0..demand.groups).map(|_| group(demand.ranks)).collect())
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn demand(model: &str, groups: usize, ranks: usize) -> Demand<'_> {
        Demand { model, groups, ranks }
    }

    #[test]
    fn groups_get_gpus_of_their_own_in_order() {
        let demands = [demand("a", 2, 2), demand("b", 1, 0), demand("c", 1, 1)];
        let some = |text: &str| Some(text.to_owned());
        let expected = |names: [&str; 3]| {
            Ok(vec![
                vec![some(names[0]), some(names[1])],
                vec![None],
                vec![some(names[2])],
            ])
        };
        for pool in [Pool::Counted(5), Pool::Counted(8), Pool::Unknown] {
            assert_eq!(assign(&pool, &demands), expected(["0,1", "2,3", "4"]), "{pool:?}");
        }
        let pool = Pool::named("7, GPU-5b,2,3,1,0");
        assert_eq!(assign(&pool, &demands), expected(["7,GPU-5b", "2,3", "1"]));
    }

    #[test]
    fn too_few_gpus_are_one_line() {
        let demands = [demand("a", 2, 2), demand("b", 1, 1), demand("c", 9, 0)];
        assert_eq!(
            assign(&Pool::Counted(4), &demands),
            Err(
                "5 GPUs are needed for a (2 x 2), b (1 x 1), replicas x parallelism.tensor, and this machine has 4: lower \
                 one of them"
                    .into()
            )
        );
        let error = assign(&Pool::named("-1"), &demands).expect_err("all are hidden");
        assert!(error.contains("CUDA_VISIBLE_DEVICES names 0"), "{error}");
        let error = assign(&Pool::named("3,-1,4,5,6,7"), &demands).expect_err("the list ends at -1");
        assert!(error.contains("CUDA_VISIBLE_DEVICES names 1"), "{error}");
    }

    #[test]
    fn device_files_are_counted() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for name in ["nvidiactl", "nvidia-uvm", "null"] {
            fs::write(folder.path().join(name), "").expect("the folder is ours");
        }
        assert_eq!(Pool::counted(folder.path()), Pool::Unknown);
        for name in ["nvidia3", "nvidia11"] {
            fs::write(folder.path().join(name), "").expect("the folder is ours");
        }
        assert_eq!(Pool::counted(folder.path()), Pool::Counted(2));
        assert_eq!(Pool::counted(Path::new("/nowhere/dev")), Pool::Unknown);
    }
}
