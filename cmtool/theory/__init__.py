"""The laboratory of exact answers: what the convergence theory of consistency training says, and what is measured.

Formalism. Data X_0 has a law on R^d. Level t = 1..T of a process is X_t = a_t X_0 + b_t Z with Z ~ N(0, I):
variance preserving (VP) when a^2 + b^2 = 1, with alpha_t = a_t^2 the *cumulative* product; variance exploding (VE)
when a = 1. Arrays over levels start at the data end: index 0 is t = 1.

* Phi_{t->k} is the map of the probability-flow ODE; Phi_t = Phi_{t->1} is the exact consistency function.
* Sequential consistency training: f_1(x) = x and f_t(x) = E[f_{t-1}(X_{t-1}) | X_t = x], both arguments made from
  the same X_0 and the same Z. Distillation (CD) replaces the random X_{t-1} by one step of an ODE solver.
* The theorem (Li, Huang, Wei 2024, arXiv 2402.07802, Theorem 1): from X_T ~ N(0, I),
  W1(f_T(X_T), X_1) <= C1 L_f^3 d^(5/2) log^5(T) / T + eps + eps_F,
  with L_f the Lipschitz constant of the flow maps, eps the training error and eps_F the error of the function class,
  both summed over the levels as E||.||.

Modules, from formulas to pages: `levels`, `laws`, `gaussian` and `distances` hold the mathematics; `population` and
`trained` run the recursion. `scaling`, `classes`, `schedules`, `typical`, `edm`, `gap`, `solvers` and `chain` are the
experiments behind the commands, each with its closed forms first and its `run` last. `study` is what they return, and
finds and runs them; `figures` draws and writes it, `checks` holds the known answers and `report` the page. Random draws
take a `numpy.random.Generator`; nothing here is global, and only the command line imports this room.
"""
